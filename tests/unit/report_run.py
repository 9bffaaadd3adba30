"""A synthetic run for the tests of the report, and a reader of its page."""

import json
from html.parser import HTMLParser

from longrope2.files.artifacts import Manifest, product_folder, write_manifest
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import ntk_part

GEOMETRY = RopeGeometry(rotary_dim=32, rope_base=10_000.0, original_len=128)
FACTORS = RescaleFactors(
    factors=(*ntk_part(5, 17.0), *(17.0 + 0.5 * i for i in range(11))),
    geometry=GEOMETRY,
    target_len=2048,
    method="longrope2",
    critical_index=5,
)
SUBJECTS = ("base", "pi", "yarn<b>", "longrope2-trained")
LENGTHS = (128, 512, 2048)
ACCURACIES = dict(
    zip(
        SUBJECTS,
        ((0.95, 0.1, 0.0), (0.95, 0.0, 0.0), (0.95, 0.2, 0.1), (0.9, 0.8, 0.6)),
        strict=True,
    )
)


def needle_row(subject, length, accuracy):
    cell = {
        "num_samples": 8,
        "num_correct": round(8 * accuracy),
        "accuracy": accuracy,
        "accuracy_interval": [0.1, 0.7],
    }
    return {
        "subject": subject,
        "length": length,
        "window": "long",
        **cell,
        "num_samples": 16,
        "perplexity": 9 - 8 * accuracy,
        "depths": [{"depth": depth, **cell, "perplexity": 2.5} for depth in (0.0, 0.5)],
    }


def evaluation_summary():
    return {
        "original_len": 128,
        "target_len": 2048,
        "reference": "base",
        "subjects": [
            {
                "name": name,
                "trained": name.endswith("trained"),
                "method": "m",
                "critical_index": None,
                "factors": [1.0, 2.0],
                "long_attention_scale": 1.0,
                "source": {"checkpoint": {"path": "runs/elsewhere/3_checkpoints/final"}},
            }
            for name in SUBJECTS
        ],
        "needle": [
            needle_row(name, n, a)
            for name in SUBJECTS
            for n, a in zip(LENGTHS, ACCURACIES[name], strict=True)
        ],
        "perplexity": [
            {
                "subject": name,
                "length": n,
                "window": "long",
                "num_windows": 4,
                "num_tokens": 256,
                "perplexity": 7.5,
            }
            for name in SUBJECTS
            for n in LENGTHS
        ],
        "retention": [
            {
                "subject": name,
                "length": 128,
                "num_windows": 9,
                "num_tokens": 1143,
                "perplexity": 8 * ratio,
                "ratio": ratio,
            }
            for name, ratio in zip(SUBJECTS, (1.0, 1.0, 1.0, 1.0123), strict=True)
        ],
    }


def contestant(name, kind, value, num_reported=0):
    return {
        "name": name,
        "kind": kind,
        "value": value,
        "interval": [value / 2, 2 * value],
        "num_choosing": 32 if num_reported else 4,
        "num_reported": num_reported,
        "factors": [1.0] * 16,
        "attention_scale": 1.25,
    }


def search_history():
    rounds = [
        {
            "iteration": i,
            "best_value": 9 - i,
            "best_critical_index": 5,
            "worst_kept_value": 12 - i,
            "num_candidates": 64 + 32 * i,
            "num_terminated": 9 * i,
            "num_losses": 500,
        }
        for i in range(4)
    ]
    return {
        "objective": "needle",
        "value_name": "needle_ppl",
        "best_value": 6.0,
        "critical_index": 5,
        "theoretical_critical_index": 6,
        "ten_period_index": 2,
        "original_len": 128,
        "target_len": 2048,
        "sample_len": 2048,
        "algorithm": "longrope2",
        "fresh": {
            "verdict": "confirmed: <better> than every closed form",
            "contestants": [
                contestant("found 1", "found", 6.5, num_reported=32),
                contestant("ntk", "closed form", 30.0, num_reported=32),
                contestant("pi", "closed form", 50.0),
                contestant("none", "closed form", 7700.0),
            ],
        },
        "rounds": rounds,
        "kept": [],
    }


def training_records():
    return [
        {
            "step": step,
            "train/tokens": 4096 * step,
            "train/loss": 3.0,
            f"train/loss_{window}": 4.0 - step / 10,
        }
        for step, window in zip(range(1, 9), ("short", "long") * 4, strict=True)
    ]


HISTOGRAM = {
    "edges_tokens": [0, 16, 32, 64, 128, 256, 4096],
    "num_documents": {
        "books": {"tokenized": [0, 0, 1, 5, 40, 7], "chosen": [0, 0, 1, 4, 30, 7]},
        "retrieval": {"tokenized": [0, 0, 0, 10, 0, 0], "chosen": [0, 0, 0, 10, 0, 0]},
    },
}


def finish(run, product, **manifest):
    folder = product_folder(run, product)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"config": {"note": "a<b"}, "commit": "abc123", **manifest}
    write_manifest(folder, Manifest(product, **facts))
    return folder


def write_records(run, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (product_folder(run, "checkpoints") / "metrics.jsonl").write_text(lines)


def write_full_run(run):
    """Every product of a finished run, with few and telling numbers."""
    tokens = {"retrieval": {"short": 100, "long": 250}, "books": {"short": 300, "long": 750}}
    finish(
        run,
        "segments",
        counts={"tokens": tokens, "num_long_segments": 1234, "num_short_segments": 0},
        seeds={"seed": 3},
        config={"corpus": {"name": "mine", "folder": "/my <texts>"}, "note": "a<b"},
        details={"original_len": 128, "target_len": 2048, "length_histogram": HISTOGRAM},
    )
    factors = finish(run, "factors", seeds={"seed": 11})
    (factors / "factors.json").write_text(FACTORS.to_json())
    (factors / "history.json").write_text(json.dumps(search_history()))
    checkpoints = finish(run, "checkpoints")
    (checkpoints / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in training_records())
    )
    text = {"corpus": "books", "own": None, "is_other": False}
    evaluations = finish(
        run,
        "evaluations",
        seeds={"needle": 7001},
        inputs={"corpus": {}},
        details={"text": text, "text_hashes": []},
    )
    (evaluations / "evaluations.json").write_text(json.dumps(evaluation_summary()))
    finish(run, "exports")


class PageText(HTMLParser):
    """Collects visible text, table rows and images; fails on a tag closed out of order."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open_tags, self.rows, self.images, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.text += data
        if self.open_tags and self.open_tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read_page(path):
    page = PageText()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open_tags == []
    return page

"""The report in a real browser: no error, every figure drawn, nothing wider than the page."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from report_run import FACTORS, evaluation_summary, finish, search_history

from longrope2.files.artifacts import product_folder
from longrope2.report.page import write_report

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
WIDTHS = (1280, 390)
# 10 CSS pixels: below, letters of a telephone cannot be read.
SMALLEST_LETTERS = 10
# What is measured inside each frame once the page in it has loaded.
HARNESS = """<!doctype html><meta charset=utf-8><body><pre id=out></pre><script>
const widths = %WIDTHS%, found = {};
function measure(frame) {
  const page = frame.contentDocument, seen = frame.contentWindow;
  const images = [...page.images];
  return {
    width: seen.innerWidth, scroll: page.documentElement.scrollWidth, images: images.length,
    blank: images.filter(i => !i.complete || !i.naturalWidth || i.clientHeight < 60)
      .map(i => i.alt),
    outside: images.filter(i => i.getBoundingClientRect().right > seen.innerWidth + 1)
      .map(i => i.alt),
    letters: Math.min(...[...page.querySelectorAll('p, td, th, li, h1, h2, code')]
      .filter(e => e.offsetParent).map(e => parseFloat(seen.getComputedStyle(e).fontSize))),
    scripts: page.scripts.length, sections: page.querySelectorAll('section').length,
  };
}
for (const width of widths) {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.onload = () => {
    found[width] = measure(frame);
    if (Object.keys(found).length === widths.length)
      document.getElementById('out').textContent = JSON.stringify(found);
  };
  frame.src = 'report.html';
  document.body.append(frame);
}
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt-get install chromium)"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def training_records() -> list[dict]:
    return [
        {
            "step": step,
            "train/tokens": 4096 * step,
            f"train/loss_{window}": 4.0 - step / 10,
            "train/loss": 4.0,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 9.0 / step,
            "perf/tokens_per_second_per_gpu": 900.0 + step,
            "perf/mfu": 0.3,
            f"perf/micro_step_seconds_{window}": 0.5,
            "perf/memory_peak_gib": 1.5,
        }
        for step, window in zip(range(1, 9), ("short", "long") * 4, strict=True)
    ]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the browser measures at each width, and what it complained of."""
    run = tmp_path_factory.mktemp("runs") / ("a_run_with_a_rather_long_name_" * 2)
    finish(
        run,
        "segments",
        counts={"tokens": {"retrieval": {"short": 100, "long": 250}, "books": {"long": 750}}},
    )
    factors = finish(run, "factors")
    (factors / "factors.json").write_text(FACTORS.to_json())
    (factors / "history.json").write_text(json.dumps(search_history()))
    (finish(run, "checkpoints") / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in training_records())
    )
    (finish(run, "evaluations") / "evaluations.json").write_text(json.dumps(evaluation_summary()))
    assert product_folder(run, "segments").is_dir()
    write_report(run)
    (run / "harness.html").write_text(HARNESS.replace("%WIDTHS%", json.dumps(WIDTHS)))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(run))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return look(f"http://127.0.0.1:{server.server_address[1]}/harness.html", run)
    finally:
        server.shutdown()


def look(address: str, folder: Path) -> dict[str, dict]:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,2000",
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={folder / 'profile'}",
    ]
    ended = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    out = re.search(r'<pre id="out">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert out and out.group(1), ended.stdout[-500:] + ended.stderr[-2000:]
    found = json.loads(out.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    console = [
        line for line in ended.stderr.splitlines() if "CONSOLE" in line and "favicon" not in line
    ]
    return {**found, "console": {"lines": console}}


def test_no_script_error(seen: dict[str, dict]) -> None:
    assert seen["console"]["lines"] == []
    assert seen["1280"]["scripts"] == 0 and seen["1280"]["sections"] == 9


@pytest.mark.parametrize("width", WIDTHS)
def test_all_figures_are_drawn(seen: dict[str, dict], width: int) -> None:
    found = seen[str(width)]
    # 3 by length, factors, search, fresh samples, 7 of the training, the mix.
    assert found["images"] == 14 and found["blank"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_readable_without_scrolling_sideways(seen: dict[str, dict], width: int) -> None:
    found = seen[str(width)]
    assert found["width"] == width and found["scroll"] <= width
    assert found["outside"] == [] and found["letters"] >= SMALLEST_LETTERS

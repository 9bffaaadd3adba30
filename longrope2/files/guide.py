"""``README.txt`` of a run folder: what is where, for who opens the folder first."""

from pathlib import Path

from longrope2.files.artifacts import write_text

GUIDE_FILE = "README.txt"
_TEXT = """\
A run of LongRoPE2. Each folder is the product of one stage; it is finished when its manifest.json
stands, which says what it was made from and with. config.yaml beside it holds every setting.

report.html      all of it on one page (python -m launch.report FOLDER writes it)
1_segments/      what is trained on: Arrow shards; report.html: documents by source and length,
                 what was left out and why
2_factors/       factors.json: the rescale factors; history.json: how they were found
3_checkpoints/   metrics.jsonl: a line a step (losses, also on held-out text where it was measured;
                 learning rate, speed); step_*/: states to go on from; heldout/: that text;
                 final/: the trained model, a Hugging Face folder
4_evaluations/   evaluations.json: needles, perplexity, the short window; suite.json: benchmarks
5_exports/       models for other programs, each with a card that says which ones read it;
                 untrained/: the same with the base model's weights

wandb/ in a folder is an offline log of Weights & Biases; this sends it:
    wandb sync FOLDER/wandb/offline-run-*

A folder that is not there belongs to a stage that was not run.
"""


def write_guide(run_folder: Path) -> None:
    """Write the guide, unless it stands there already."""
    path = run_folder / GUIDE_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != _TEXT:
        write_text(path, _TEXT)

"""Fixtures. The suite runs on two CPU cores and sees no accelerator, to compare bit for bit: only `-m gpu` does."""

import collections
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # helpers, from whichever folder pytest is started

import pytest
import torch


def pytest_configure(config):
    """Before anything asks for CUDA."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` collects the files that have such tests: a machine with a GPU may lack what the others import."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_terminal_summary(terminalreporter):
    """What was skipped is counted and said, a line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in collections.Counter(report.longrepr[2] for report in skipped).items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def one_thread():
    """One thread and an untouched global generator, whatever the test before did."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """A demo folder with every stage's output, made once, as small as it goes. Read only: `helpers.copy` to change."""
    from helpers import STAGES, run_stage  # here, as the tests for a GPU do without what the stages import

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("demo")
    for name in STAGES:
        run_stage(root, name)
    return root


@pytest.fixture(scope="session")
def made(chain, tmp_path_factory) -> dict[str, Path]:
    """The baselines' folders: pairs of both kinds and their labels by exact physics. Read only."""
    from helpers import labelled, make_samples

    root = tmp_path_factory.mktemp("baselines")
    at = {name: root / name for name in ("flow", "structural", "by_clip", "by_segment")}
    for kind in ("flow", "structural"):
        make_samples(chain, at[kind], kind=kind)
    labelled(chain, at["flow"], at["by_clip"])
    labelled(chain, at["structural"], at["by_segment"], segments=5)
    return at

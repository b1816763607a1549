"""The checkpoint directory that a rewrite writes; it appears when it is complete."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..system.reading import one_line

_SIDE_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "generation_config.json",
    "task.tsv",
    "LICENSE*",
)


@contextmanager
def new_checkpoint(output: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `output` at the end; an exception removes it. Raises UserError if the disk refuses."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}); choose another -o") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{output} cannot be written ({one_line(error)})") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_side_files(checkpoint: Checkpoint, config: dict[str, Any], folder: Path) -> None:
    """`config` as config.json, and the files beside the source's weights: tokenizer, generation config, task, licence."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source = checkpoint.files[0].parent
    if checkpoint.files[0].suffix == ".gguf":
        if checkpoint.generation:
            (folder / "generation_config.json").write_text(json.dumps(checkpoint.generation) + "\n", encoding="utf-8")
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(folder)
        return
    for pattern in _SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)

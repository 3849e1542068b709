"""Cells, heads and networks in the folders of the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`.

Such a folder holds `model.safetensors`, which is this project's own file (`fast/checkpoint.py`) and describes itself,
`config.json` with the same description for people and for the Hub, and a model card. Files of `fast/checkpoint.py` need no
package of the Hub; these three methods do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ModuleNotFoundError:  # everything else needs PyTorch and NumPy alone

        class PyTorchModelHubMixin:
            """Stands for the Hub's class, and says what it needs."""

            def save_pretrained(self, *arguments: Any, **options: Any) -> None:
                raise ModuleNotFoundError("the Hub's folders need huggingface_hub: pip install huggingface_hub safetensors")

            push_to_hub = save_pretrained
            from_pretrained = classmethod(save_pretrained)


FILE = "model.safetensors"


class HubModule(nn.Module, PyTorchModelHubMixin):
    """A module that is saved in, and loaded from, a folder or a repository of the Hub, by the Hub's own methods.

    `description` is what the module does not know itself and its file is to say, such as {"class_names": ("road", "car")}.
    One that was loaded from a file has that file's.
    """

    description: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        return nn.Module.__new__(cls)  # the Hub's would keep the arguments, which the file describes

    def _save_pretrained(self, save_directory: Path) -> None:
        from fast import checkpoint  # which imports the modules themselves

        file_format, description = checkpoint.describe(self)
        checkpoint.save(save_directory / FILE, self)
        config = json.dumps({"format": file_format, "description": description}, indent=1)
        checkpoint.write_whole(save_directory / "config.json", config.encode())

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str | torch.device = "cpu",
        **unknown: Any,
    ) -> Self:
        from huggingface_hub import hf_hub_download

        from fast import checkpoint

        given = [name for name, value in unknown.items() if value is not None]  # huggingface_hub below 1 gives proxies=None
        if given:
            raise TypeError(f"from_pretrained does not take {', '.join(given)}: the file alone says what is built from it")
        path = Path(model_id) / FILE
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return checkpoint.load(path, cls).to(map_location)

    def generate_model_card(self, *arguments: Any, **options: Any) -> "ModelCard":
        """The card that `save_pretrained` writes, as `README.md`."""
        from fast.checkpoint import describe
        from fast.model_card import model_card

        return model_card(FILE, *describe(self))

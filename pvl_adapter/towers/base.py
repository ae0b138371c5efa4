"""What the lockstep must know of a host's two towers, whatever its family.

Towers hold no reference to the model, so models stay deep-copyable.

Shape alphabet: B batch, V image tokens, N patches, L text tokens, W tower width, D joint width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

RGB = tuple[float, float, float]
OPENAI_DATASET_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, the default of both libraries
OPENAI_DATASET_STD: RGB = (0.26862954, 0.26130258, 0.27577711)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, hidden state included."""
Inputs = Mapping[str, Any]
"""The arguments of the host's own forward, by name."""


@dataclass(frozen=True)
class Tower:
    """One tower of a host.

    Attributes:
        path: Leads from the host to its list of blocks.
        projection: What the host does with the last hidden state of a token to bring it into the joint space: paths of
            modules or matrices, applied in turn (None on the host is skipped). None if the host has no such way.
        key: The argument of the host's forward that holds the image or the token ids.
    """

    path: str
    projection: tuple[str, ...] | None
    key: str

    def blocks(self, host: nn.Module) -> nn.ModuleList:
        return host.get_submodule(self.path)  # type: ignore[return-value]

    def encoder_module(self, host: nn.Module) -> nn.Module:
        """The module that loops over the blocks."""
        return host.get_submodule(self.path.rpartition(".")[0])

    def width(self, host: nn.Module) -> int:
        """Width W of the tower's tokens."""
        raise NotImplementedError

    def encode(self, host: nn.Module, inputs: Inputs) -> Tensor:
        """Run the tower by the host's own code; pooled embeddings in the joint space, [B, D], not normalised."""
        raise NotImplementedError

    def dummy_inputs(self, host: nn.Module, *, batch: int) -> dict[str, Any]:
        """Arguments that the tower can run on, to see what its blocks are given."""
        raise NotImplementedError

    def block_arguments(
        self, host: nn.Module, inputs: Inputs, index: int, given: Arguments, previous: Any
    ) -> Arguments:
        """What block `index` is given, from what block 0 was given and what the previous block returned.

        The same for every block unless a family says otherwise; `inject_adapters` checks it against the host.
        """
        return given

    def unsupported_reason(self, host: nn.Module) -> str | None:
        """Why this very model cannot be run in lockstep, or None."""
        return None

    def last_block_for_pooling(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the last block returns, right at the pooled token alone; None if there is no short cut."""
        return None

    def joint_overrides(self, host: nn.Module) -> dict[str, Any]:
        """Attributes of `owner` to be set during a joint call (and set back after it)."""
        return {}

    def project_tokens(self, host: nn.Module, hidden: Tensor) -> Tensor | None:
        """Bring hidden states [B, tokens, W] into the joint space, [B, tokens, D]."""
        if self.projection is None:
            return None
        tokens = hidden.flatten(0, 1)  # [B * tokens, W], as GroupViT's batch norm needs
        for path in self.projection:
            part = attrgetter(path)(host)
            if part is not None:
                tokens = part(tokens) if isinstance(part, nn.Module) else tokens @ part
        return tokens.view(*hidden.shape[:2], -1)


@dataclass(frozen=True)
class ImageTower(Tower):
    """The tower that reads images: its last N tokens are the patches, row by row, unless a family says otherwise."""

    def image_size(self, host: nn.Module) -> tuple[int, int]:
        """Height and width the tower was built for, in pixels."""
        raise NotImplementedError

    def patch_size(self, host: nn.Module) -> tuple[int, int]:
        raise NotImplementedError

    def takes_any_size(self, host: nn.Module, inputs: Inputs) -> bool:
        """Whether these inputs may have another size than `image_size`."""
        return False

    def normalization(self, host: nn.Module) -> tuple[RGB, RGB]:
        """Mean and standard deviation of red, green and blue in [0, 1] that the host was trained with."""
        return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    def grid(self, host: nn.Module, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of patches for these inputs."""
        height, width = inputs[self.key].shape[-2:]
        patch_height, patch_width = self.patch_size(host)
        return height // patch_height, width // patch_width

    def patches(self, host: nn.Module, inputs: Inputs, hidden: Tensor) -> Tensor | None:
        """Patch tokens in the joint space, [B, N, D], from the last block's output."""
        rows, columns = self.grid(host, inputs)
        tokens = self.project_tokens(host, hidden)  # [B, V, D]
        return None if tokens is None else tokens[:, tokens.shape[1] - rows * columns :]

    def drops_patches(self, host: nn.Module) -> bool:
        """Whether the tower, in train mode, drops patches at random."""
        return False

    def token_mask(self, host: nn.Module, inputs: Inputs) -> Tensor | None:
        """[B, V] bool, True where a position holds a patch rather than padding; None if there is no padding."""
        return None

    def gather(self, host: nn.Module, inputs: Inputs, hidden: Tensor) -> Tensor:
        """The tokens as an adapter sees them: one sequence for each sentence."""
        return hidden

    def scatter(self, host: nn.Module, inputs: Inputs, tokens: Tensor) -> Tensor:
        """Undo `gather`."""
        return tokens

    def dummy_inputs(self, host: nn.Module, *, batch: int) -> dict[str, Any]:
        reference = next(host.parameters())
        height, width = self.image_size(host)
        return {self.key: torch.zeros(batch, 3, height, width, device=reference.device, dtype=reference.dtype)}

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError for an image the tower cannot take."""
        image = inputs[self.key]
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"{self.key} is {describe(image)}, expected a floating-point tensor [batch, 3, height, width] "
                "as the model's own preprocessing makes it"
            )
        size = self.image_size(host)
        if tuple(image.shape[-2:]) != size and not self.takes_any_size(host, inputs):
            raise ValueError(
                f"{self.key} is {image.shape[-2]} x {image.shape[-1]} pixels, this model takes {size[0]} x {size[1]}; "
                f"resize it{self.other_sizes}"
            )
        check_finite(image, name=self.key)

    @property
    def other_sizes(self) -> str:
        """How the host could be made to take other sizes, to end an error message."""
        return ""


@dataclass(frozen=True)
class TextTower(Tower):
    """The tower that reads sentences."""

    def context_length(self, host: nn.Module) -> int | None:
        """How many positions the tower has; None if any number will do."""
        raise NotImplementedError

    def variable_length(self, host: nn.Module) -> bool:
        """Whether fewer tokens than `context_length` will do."""
        return True

    def ignores_padding(self, host: nn.Module) -> bool:
        """Whether padding at the end changes nothing for a sentence's own tokens and its pooled embedding."""
        return False

    def vocab_size(self, host: nn.Module) -> int:
        raise NotImplementedError

    def tokenizer_name(self, host: nn.Module) -> str | None:
        """Hub name or folder of the tokenizer the host was trained with, if it tells."""
        return None

    def token_mask(self, host: nn.Module, inputs: Inputs) -> Tensor:
        """[B, L] bool, True where a position holds a token of the sentence rather than padding."""
        raise NotImplementedError

    def tokens(self, host: nn.Module, hidden: Tensor) -> Tensor | None:
        """Text tokens in the joint space, [B, L, D], from the last block's output."""
        return self.project_tokens(host, hidden)

    def dummy_inputs(self, host: nn.Module, *, batch: int) -> dict[str, Any]:
        # The highest id last: an end token for those families that look for one.
        ids = torch.ones(batch, self.context_length(host) or 8, dtype=torch.long, device=next(host.parameters()).device)
        ids[:, -1] = self.vocab_size(host) - 1
        return {self.key: ids}

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError for token ids the tower cannot take."""
        text = inputs[self.key]
        integers = isinstance(text, Tensor) and not (text.is_floating_point() or text.is_complex())
        if not integers or text.ndim != 2 or text.dtype == torch.bool:
            raise ValueError(f"{self.key} is {describe(text)}, expected integer token ids [batch, tokens]")
        length, limit = text.shape[1], self.context_length(host)
        if length == 0:
            raise ValueError(f"{self.key} holds 0 tokens, expected at least one for each sentence")
        if limit is not None and length > limit:
            raise ValueError(f"{self.key} holds {length} tokens, this model takes at most {limit}; truncate it")
        if limit is not None and length < limit and not self.variable_length(host):
            raise ValueError(f"{self.key} holds {length} tokens, this model takes exactly {limit}; pad it")
        vocabulary = self.vocab_size(host)
        if may_read(text) and text.numel() and (int(text.min()) < 0 or int(text.max()) >= vocabulary):
            raise ValueError(
                f"{self.key} holds token ids from {int(text.min())} to {int(text.max())}, this model's vocabulary has "
                f"{vocabulary}; was another model's tokenizer used?"
            )


@dataclass(frozen=True)
class Towers:
    """The two towers of a host and the names of its forward's arguments, in order."""

    image: ImageTower
    text: TextTower
    parameters: tuple[str, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call of the host."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def joint_width(self, host: nn.Module) -> int | None:
        """Width D of the joint space, None if single patches cannot be brought there."""
        reference = next(self.image.blocks(host).parameters())
        token = self.image.project_tokens(host, reference.new_zeros(1, 1, self.image.width(host)))
        return None if token is None else token.shape[-1]

    def inputs(self, image: Tensor | Inputs, text: Tensor | Inputs) -> dict[str, Any]:
        """Arguments of the host for images and token ids, or for the mappings that Hugging Face processors return."""
        return {**self.image_inputs(image), **self.text_inputs(text)}

    def image_inputs(self, image: Tensor | Inputs) -> dict[str, Any]:
        return self._named(image, self.image.key, "pixel_values")

    def text_inputs(self, text: Tensor | Inputs) -> dict[str, Any]:
        return self._named(text, self.text.key, "input_ids")

    def _named(self, given: Tensor | Inputs, key: str, processors_key: str) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            return {key: given}
        if processors_key not in given:
            raise ValueError(f"got a mapping with {sorted(given)}, expected {processors_key!r} among them")
        renamed = {key if name == processors_key else name: value for name, value in given.items()}
        return {name: value for name, value in renamed.items() if name in self.parameters}

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError unless the inputs are image and text batches of one size that the host can take."""
        for tower in (self.image, self.text):
            if inputs.get(tower.key) is None:
                raise ValueError(
                    f"{tower.key} is missing: the towers are joined, so every call takes images and sentences; "
                    "for one tower alone use `with pvl_adapter.disable_adapters(model):`"
                )
            tower.check(host, inputs)
        images, sentences = inputs[self.image.key].shape[0], inputs[self.text.key].shape[0]
        if images == sentences == 0:
            raise ValueError("the batch is empty, expected at least one image and its sentence")
        if inputs.get("output_attentions"):
            raise ValueError("attentions of joined towers cannot be recorded; ask without output_attentions")
        if images != sentences:
            raise ValueError(
                f"got {images} images and {sentences} sentences, expected one sentence for each image; repeat the fewer"
            )


def mask_through(position: Tensor, *, length: int) -> Tensor:
    """[B, length] bool, True up to and including each row's `position` [B]."""
    return torch.arange(length, device=position.device) <= position[:, None]


def before_trailing_run(text: Tensor) -> Tensor:
    """[B, L] bool, for towers that pool the last position and do not tell their padding id.

    Whatever id a row ends with is its padding; the first of that final run may be the end token and counts as real.
    """
    differs = text != text[:, -1:]  # [B, L]
    positions = torch.arange(text.shape[1], device=text.device)
    last_other = torch.where(differs, positions, -1).amax(dim=1)  # [B]
    return mask_through(last_other + 1, length=text.shape[1])


def pair(size: Any) -> tuple[int, int]:
    """Height and width from an int or a pair, as configurations hold either."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def check_finite(tensor: Tensor, *, name: str) -> None:
    """Raise ValueError for NaN or infinite values, where looking is free."""
    if may_read(tensor) and not torch.isfinite(tensor).all():
        bad = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{name} holds NaN or infinite values in batch item {bad}, expected finite numbers")


def may_read(tensor: Tensor) -> bool:
    """Whether values can be looked at without making a GPU wait or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def describe(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

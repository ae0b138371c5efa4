"""The interface of a tower: what the lockstep asks about a host's image or text tower, whatever its family.

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

from pvl_adapter.towers.normalization import Normalization

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, hidden state included."""
Inputs = Mapping[str, Any]
"""The arguments of the host's own forward, by name."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One tower of a host.

    Attributes:
        path: Leads from the host to its list of blocks.
        projection: How the host brings the last hidden state of a token into the joint space: paths of modules or
            matrices, applied in turn (None on the host is skipped). None if the host cannot do that for each token.
        key: The argument of the host's forward that holds the image or the token ids.
        config: Leads from the host to the object that holds the tower's sizes; empty for the host itself.
        width_name: Where that object keeps the width of the tokens. Fields named `*_name` below are alike.
        joint_attributes: Attributes of `encoder_module` and their values during a joint call.
        key_value: Paths of a block's layers that make keys and values, where the tower masks padding as keys.
    """

    path: str
    projection: tuple[str, ...] | None
    key: str
    config: str
    width_name: str = "hidden_size"
    joint_attributes: tuple[tuple[str, Any], ...] = ()
    key_value: tuple[str, ...] = ()

    def settings(self, host: Any) -> Any:
        """The object that holds the tower's sizes."""
        return attrgetter(self.config)(host) if self.config else host

    def blocks(self, host: nn.Module) -> nn.ModuleList:
        """The tower's blocks, in the order they run."""
        return host.get_submodule(self.path)  # type: ignore[return-value]

    def encoder_module(self, host: nn.Module) -> nn.Module:
        """The module that loops over the blocks."""
        return host.get_submodule(self.path.rpartition(".")[0])

    def width(self, host: nn.Module) -> int:
        """Width W of the tower's tokens."""
        return int(attrgetter(self.width_name)(self.settings(host)))

    def encode(self, host: nn.Module, inputs: Inputs) -> Tensor:
        """Run the tower by the host's own code; pooled embeddings in the joint space, [B, D], not normalised."""
        raise NotImplementedError

    def dummy_inputs(self, host: nn.Module, *, batch: int) -> dict[str, Any]:
        """Arguments the tower can run on, to record what its blocks are given."""
        raise NotImplementedError

    def block_arguments(
        self, host: nn.Module, inputs: Inputs, index: int, given: Arguments, previous: Any
    ) -> Arguments:
        """What block `index` is given, from what block 0 was given and what the previous block returned.

        The same for every block unless a family overrides it; `inject_adapters` checks it against the host.
        """
        return given

    def unsupported_reason(self, host: nn.Module) -> str | None:
        """Why this very model cannot be run in lockstep, or None."""
        return None

    def joint_overrides(self, host: nn.Module) -> dict[str, Any]:
        """Attributes of `encoder_module` to set during a joint call and to restore after it."""
        return dict(self.joint_attributes)

    def project_tokens(self, host: nn.Module, hidden: Tensor) -> Tensor | None:
        """Bring hidden states [B, tokens, W] into the joint space, [B, tokens, D]."""
        if self.projection is None:
            return None
        tokens = hidden.flatten(0, 1)  # [B * tokens, W]
        for path in self.projection:
            part = attrgetter(path)(host)
            if part is not None:
                tokens = part(tokens) if isinstance(part, nn.Module) else tokens @ part
        return tokens.view(*hidden.shape[:2], -1)


@dataclass(frozen=True, kw_only=True)
class ImageTower(Tower):
    """The tower that reads images: its last N tokens are the patches, row by row, unless a family overrides it.

    Attributes:
        other_sizes: How the host could be made to take images of other sizes, to end an error message.
    """

    size_name: str = "image_size"
    patch_name: str = "patch_size"
    other_sizes: str = ""

    def image_size(self, host: nn.Module) -> tuple[int, int]:
        """Height and width the tower was built for, in pixels."""
        return pair(attrgetter(self.size_name)(self.settings(host)))

    def patch_size(self, host: nn.Module) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return pair(attrgetter(self.patch_name)(self.settings(host)))

    def takes_any_size(self, host: nn.Module, inputs: Inputs) -> bool:
        """Whether these inputs may have another size than `image_size`."""
        return False

    def normalization(self, host: nn.Module) -> Normalization | None:
        """Mean and standard deviation the host was trained with, for pixels in [0, 1]; None where that is unknown."""
        raise NotImplementedError

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
        return {self.key: next(host.parameters()).new_zeros(batch, 3, *self.image_size(host))}

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


@dataclass(frozen=True, kw_only=True)
class TextTower(Tower):
    """The tower that reads sentences.

    Attributes:
        positions_after_padding: Whether positions are counted from behind the padding id, as RoBERTa's are.
    """

    length_name: str = "max_position_embeddings"
    vocab_name: str = "vocab_size"
    positions_after_padding: bool = False

    def context_length(self, host: nn.Module) -> int | None:
        """How many positions the tower has; None if any number will do."""
        settings = self.settings(host)
        limit = getattr(settings, self.length_name, None)
        if limit is None:
            return None
        return int(limit) - (int(settings.pad_token_id) + 1 if self.positions_after_padding else 0)

    def variable_length(self, host: nn.Module) -> bool:
        """Whether fewer tokens than `context_length` will do."""
        return True

    def ignores_padding(self, host: nn.Module, inputs: Inputs) -> bool:
        """Whether padding at the end changes nothing for a sentence's own tokens and its pooled embedding."""
        return False

    def vocab_size(self, host: nn.Module) -> int:
        """Number of token ids."""
        return int(attrgetter(self.vocab_name)(self.settings(host)))

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
        # The highest id last: some families look for an end token.
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
        # Equally long: torch.compile of torch 2.7 takes any zip for a strict one.
        return {**dict(zip(self.parameters[: len(args)], args, strict=False)), **kwargs}

    def joint_width(self, host: nn.Module) -> int | None:
        """Width D of the joint space, None if single patches cannot be brought there."""
        reference = next(self.image.blocks(host).parameters())
        token = self.image.project_tokens(host, reference.new_zeros(1, 1, self.image.width(host)))
        return None if token is None else token.shape[-1]

    def inputs(self, image: Tensor | Inputs, text: Tensor | Inputs) -> dict[str, Any]:
        """Arguments of the host for images and token ids, or for the mappings that Hugging Face processors return."""
        return {**self.image_inputs(image), **self.text_inputs(text)}

    def image_inputs(self, image: Tensor | Inputs) -> dict[str, Any]:
        """Arguments of the host for images alone."""
        return self._named(image, self.image.key, "pixel_values")

    def text_inputs(self, text: Tensor | Inputs) -> dict[str, Any]:
        """Arguments of the host for token ids alone."""
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


def pair(size: Any) -> tuple[int, int]:
    """Height and width from an int or a pair, as configurations hold either."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def check_finite(tensor: Tensor, *, name: str) -> None:
    """Raise ValueError for NaN or infinite values, where looking costs little."""
    if may_read(tensor) and not torch.isfinite(tensor).all():
        bad = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{name} holds NaN or infinite values in batch item {bad}, expected finite numbers")


def may_read(tensor: Tensor) -> bool:
    """Whether values can be looked at without making a GPU wait or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def describe(value: object) -> str:
    """Type and shape of a value, for an error message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

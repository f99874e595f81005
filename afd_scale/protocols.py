"""The few interfaces that cross packages: what a method needs of engines, and a trainer of methods."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from afd_scale.types import Batch, Videos

Metrics = Mapping[str, Tensor]  # scalars, left on their device until they are logged


class Processes(Protocol):
    """The processes that share a job."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any: ...

    def run_on_all(self, work: Callable[..., Any], *arguments: Any) -> Any: ...


class Watch(Protocol):
    """Is told how a step goes on; the trainer's may give it up."""

    def between(self) -> None:
        """Another micro-batch is to come; on all ranks together."""
        ...

    def updating(self, engine: Any) -> None:
        """The weights of an engine are about to change; on all ranks together."""
        ...

    def skipping(self, engine: Any) -> None:
        """An engine has left out an update, whose gradient was not finite; on all ranks together."""
        ...


class Unwatched:
    """A watch that nobody keeps."""

    def between(self) -> None:
        pass

    def updating(self, engine: Any) -> None:
        pass

    def skipping(self, engine: Any) -> None:
        pass


class Engine(Protocol):
    """What an engine, plain or sharded, adds to every network.

    Attributes:
        micro_batch: videos that pass through together; None is all.
        watch: of the run's steps.
    """

    micro_batch: int | None
    watch: Watch

    def resident(self, sampling: bool = False) -> AbstractContextManager[None]:
        """A phase of passes without gradient: weights may stay whole on every rank, and at its end none does.

        Args:
            sampling: predictions are not compared with those of passes with gradient, to the last bit of a small
                difference: an adapter may be merged into its base.
        """
        ...


class Policy(Engine, Protocol):
    """A velocity model: arguments and result as `afd_scale.models.wan.CausalWan.forward`."""

    def __call__(self, noisy: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor: ...

    def new_cache(self, frames: int | None) -> Any: ...


class Scorer(Engine, Protocol):
    """A judge: videos, of which it reads what it likes, to (B,) logits."""

    def __call__(self, videos: Videos) -> Tensor: ...


class Trained(Engine, Protocol):
    """What an engine adds to the network it trains; losses are means over this rank's share."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to those gathered since the last step; each forward pass has one."""
        ...

    def step(self, learning_rate: float) -> Tensor:
        """Update the weights from the gradients gathered so far; returns the gradient's global norm before clipping."""
        ...


class TrainedPolicy(Policy, Trained, Protocol):
    """The student."""


class TrainedScorer(Scorer, Trained, Protocol):
    """The discriminator."""

    def input_gradient(self, videos: Videos, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A loss of the videos' logits and its gradient with respect to their latents; the weights get none.

        Returns:
            The loss, and (B, F, C, H, W).
        """
        ...


class AveragedPolicy(Policy, Protocol):
    """A frozen policy that follows the student."""

    def follow(self, student: Any, decay: float) -> None:
        """weights <- decay weights + (1 - decay) student's, on local shards."""
        ...


class Method(Protocol):
    """One training step; a method owns its backward passes, the trainer owns the rest.

    Attributes:
        warmup_steps: before the first step.
        memory: scalars that a step leaves to those after it besides weights, alike on all ranks; in the checkpoint.
    """

    warmup_steps: int
    memory: dict[str, Tensor]

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Step 1 - warmup_steps, ..., 0 (what must be learned before the student moves), and then 1, 2, ...

        Returns:
            Metrics of this rank's share; their means over ranks are logged.
        """
        ...

"""Streams the per-sample gradients of a module into features, inside one ordinary backward.

    with sketcher.batch(B) as features:          # [B, K], zeros
        f = outputs_of(model(...))               # [B · rows_per_sample]
        f.sum().backward()
    # features[b] = Rᵀ ∇_θ Σ_{rows of b} f

A forward in the place of each layer's own keeps its input, a hook on the node that made its output
receives the output gradient, and the layer's per-sample weight gradient is formed in slices,
projected and dropped. Autograd computes no weight gradient: a module's parameters are frozen while
its forward runs. Contributions are summed, so a module used twice or a weight shared by two modules
is right without being a special case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..projection import Projection
from .accumulator import Accumulator, make_accumulator
from .cost import Plan, make_plan
from .hooks import (
    Call,
    Layer,
    Seen,
    Watched,
    autocast_type,
    fresh,
    gate,
    is_discrete,
    saving_is_hooked,
    tensors_of,
)
from .norms import NormingAccumulator
from .parameters import (
    ParameterChoice,
    check_places,
    choose_parameters,
    find_places,
    registered_at,
)
from .planned import (
    BatchMemory,
    PlannedAccumulator,
    ShapeMeter,
    fused_attention,
    weight_bytes,
)
from .randomness import RandomnessWatch
from .rows import (
    CallRows,
    RowCheck,
    find_rows,
    leaves_kept,
    missing_rows,
    repeat_rows,
    sequence_first,
    wrong_outputs,
    wrong_rows,
)
from .rules import Rule, kept_statistics, own_rule, rule_applies
from .weight import LayerGradient, positions_last

if TYPE_CHECKING:
    from .whitening.accumulator import WhiteningAccumulator
    from .whitening.definition import Whitening


_SECOND = (
    "second backward, after one that checked rows: if a backward of this model cannot run twice, "
    "check_rows=False leaves the first one out"
)


@dataclass
class _Batch:
    """State of one open batch."""

    features: Tensor
    rows: int
    rows_per_sample: int
    anchor: Tensor
    # whether a backward that runs now counts
    counts: bool = True
    # whether rows that sizes alone suggest are going to be checked
    guesses: bool = False
    # what a backward that runs now is looked at by
    check: RowCheck | None = None
    # calls of layers that a checkpoint makes again
    dropped: int = 0
    seen: set[str] = field(default_factory=set)
    without_grad: set[str] = field(default_factory=set)
    # layers, by name, whose rows are not the usual ones
    unusual: dict[str, tuple[Layer, CallRows]] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.features)


class GradientSketcher:
    """Projects the per-sample gradients of a batch as its backward produces them.

    For every kind of projection, the features of a batch equal
    ``project(flattened per-sample gradients, projection)`` to rounding, the parameters flattened in
    ``named_parameters()`` order.

    Linear, Embedding, convolutions (one to three dimensions, transposed or not, any stride,
    padding, dilation and groups), GroupNorm, LayerNorm and RMSNorm have rules of their own, and
    the Conv1D of GPT-2. Any other module that owns parameters is recomputed sample by sample in
    the backward: exact when it is deterministic, treats the rows of its batch independently and
    returns tensors. Everything else is refused by name, never skipped.

    With ``rows_per_sample=1`` every row is a sample: features of single timesteps or tokens, before
    they are summed, whose norms (``norms=True``) normalise them.

    LSTM, GRU, RNN, MultiheadAttention and torch's Transformer layers are served wherever they have
    their samples, by recomputing or by the rules of what they are made of. An embedding that is
    looked up once for the whole batch (positions) gives a row to every sample.

    Rows are told by their number: a first dimension of ``B · rows_per_sample``, or in `sketch` of a
    multiple of it or the second one, is taken for the batch. Numbers can lie (a sequence as long as
    the batch is large, an expert that sees as many tokens), so `sketch` checks them: on the first
    batch of each number of rows, or with a layer that was not seen in one, a backward of its own
    through the same graph leaves out every other sample, whose rows must be exactly zero then, and
    the others what they are in the next. `batch` has no outputs to do that with, and warns once.

    Args:
        model: the module whose parameters are differentiated. It is not modified outside `batch`.
        projection: the random matrix; or instead of it
        into: where the gradients go: an `Accumulator` class, or whatever makes one of the list of
            the parameters' shapes.
        parameters: names, or a predicate ``(name, parameter) -> bool``; by default every parameter
            that requires a gradient. Those without elements are left out.
        rows_per_sample: S, consecutive rows of the forward batch that belong to one sample
            (timesteps, tokens); their gradients are summed.
        implementation: ``"torch"``, ``"triton"``, or ``None`` for Triton on a GPU and torch
            elsewhere; ``"triton"`` never falls back. Kind ``"sjlt"`` with Triton makes the gradient
            of a Linear or Conv2d weight and its sketch in one kernel; kind ``"kronecker"`` is torch
            everywhere.
        norms: also collect the exact norms of the per-sample gradients, see `grad_norms`. Free
            where the gradient is formed in slices; elsewhere from the Grams of inputs and output
            gradients, or from slices, whichever costs less.
        whitening: a linear map W of the gradients, fitted to this model and these parameters: the
            features are those of W·g, and so are the norms.
        check_rows: whether `sketch` checks that rows are samples. The caller's hooks on gradients
            run in that backward, too. Without it only rows that are as many as the batch's are
            taken.

    Attributes:
        parameter_names: names of the chosen parameters, in flattening order.
        shapes: their shapes.
        grad_dim: ``P``, their total number of elements.
        proj_dim: ``K``, the width of the features.
        into: where the gradients go: what ``into`` made, or what the projection is done by.
        whitening: the map of the gradients, if any.

    Raises:
        ValueError: no parameter is chosen or one is not real, a name is unknown,
            ``rows_per_sample`` is not positive, the model is compiled or scripted, it mixes samples
            (batch normalisation on batch statistics), ``implementation`` is unknown, not one of
            ``projection`` and ``into`` is given, or ``whitening`` is of something else, or of whole
            patches for kind ``"kronecker"``.
        TypeError: ``into`` did not make an `Accumulator`.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection | None = None,
        *,
        into: Callable[[list[tuple[int, ...]]], Accumulator] | None = None,
        parameters: ParameterChoice = None,
        rows_per_sample: int = 1,
        implementation: str | None = None,
        norms: bool = False,
        whitening: Whitening | None = None,
        check_rows: bool = True,
    ) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod"):
                raise ValueError(
                    f"model must not be compiled, got {name or 'the model itself'!r} that is: its "
                    "modules are traced away; pass what was given to torch.compile"
                )
        if rows_per_sample < 1:
            raise ValueError(f"rows_per_sample must be at least 1, got {rows_per_sample}")
        self.model, self.projection, self.rows_per_sample = model, projection, rows_per_sample
        chosen = choose_parameters(model, parameters)
        self.parameter_names = list(chosen)
        self.shapes = [tuple(parameter.shape) for parameter in chosen.values()]
        self.grad_dim = sum(parameter.numel() for parameter in chosen.values())
        self._parameters = list(chosen.values())
        self._layers = self._find_layers()
        for layer in self._layers:
            if isinstance(layer.module, torch.jit.ScriptModule):
                raise ValueError(
                    f"model must not be scripted, got {layer.name!r} that is: pass what was given "
                    "to torch.jit, or leave its parameters out with parameters="
                )
        self._places = find_places(model, self._layers)
        # walking the module tree takes longer than many a layer
        self._model_parameters = list(model.parameters())
        self._modules = list(model.modules())
        self._normalisations = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._refuse_mixing()
        self.into = self._destination(projection, into, implementation)
        self.proj_dim = self.into.num_features
        self._norms = NormingAccumulator(self.into, self.parameter_names) if norms else None
        self._accumulator: Accumulator = self._norms or self.into
        self.whitening = whitening
        self._whitened: WhiteningAccumulator | None = None
        if whitening is not None:
            self._whiten(whitening)
        self._batch: _Batch | None = None
        self._last_norms: Tensor | None = None
        self._frozen = [0] * len(self._parameters)
        self._recomputing = False
        self.check_rows = check_rows
        # names of the layers whose rows were checked, by the number of rows of the batch
        self._checked: dict[int, set[str]] = {}
        self._watched_randomness = self._told_unchecked = False
        # takes the accumulator's place in a plan
        self._planned: PlannedAccumulator | None = None

    def _find_layers(self) -> list[Layer]:
        index = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        modules = dict(self.model.named_modules())
        # its own forward uses the parameters of a child that never runs
        whole = [
            module
            for module in modules.values()
            if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, nn.Linear)
        ]
        covered = {module.out_proj for module in whole}
        second = set(sequence_first(self.model))
        layers = []
        for name, module in modules.items():
            owned = {
                path: index[id(parameter)]
                for path, parameter in module.named_parameters(
                    recurse=module in whole, remove_duplicate=False
                )
                if id(parameter) in index
            }
            if owned and module not in covered:
                title = name or type(self.model).__name__
                layers.append(Layer(title, module, owned, int(module in second)))
        return layers

    def _whiten(self, whitening: Whitening) -> None:
        """Put the whitening before where gradients go."""
        from .whitening.accumulator import WhiteningAccumulator

        whitening.check_model(self.model, self.parameter_names, self.shapes)
        if whitening.kind == "none":
            return
        parameters = whitening.to(self.device, self.dtype).parameters
        self._whitened = WhiteningAccumulator(self._accumulator, parameters, self.parameter_names)
        self._accumulator = self._whitened

    def _destination(
        self,
        projection: Projection | None,
        into: Callable[[list[tuple[int, ...]]], Accumulator] | None,
        implementation: str | None,
    ) -> Accumulator:
        if projection is not None and into is None:
            return make_accumulator(self.shapes, projection, implementation)
        if projection is not None or into is None:
            got = "neither" if into is None else "both"
            raise ValueError(f"one of projection and into must be given, got {got}")
        if implementation is not None:
            raise ValueError(
                f"implementation must be None with into, got {implementation!r}: it has its own"
            )
        accumulator = into(list(self.shapes))
        if not isinstance(accumulator, Accumulator):
            raise TypeError(f"into must make an Accumulator, got {type(accumulator).__name__}")
        return accumulator

    @property
    def layers(self) -> list[Layer]:
        """The modules that own chosen parameters."""
        return self._layers

    @property
    def device(self) -> torch.device:
        """Where the parameters, and so the features, live."""
        return self._parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features: float64 for a float64 model, else float32."""
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        return torch.float64 if wide else torch.float32

    @property
    def grad_norms(self) -> Tensor:
        """``[B]`` norms of the per-sample gradients of the last batch, dtype of the features.

        Raises:
            RuntimeError: the sketcher was not made with ``norms=True``, or saw no batch yet.
        """
        if self._norms is None:
            raise RuntimeError("grad_norms must be asked for: GradientSketcher(..., norms=True)")
        if self._last_norms is None:
            raise RuntimeError("grad_norms must follow a complete batch, got none")
        return self._last_norms

    def sketch(self, outputs: Callable[[], Tensor], num_samples: int) -> Tensor:
        """Features of one batch.

        Args:
            outputs: runs the forward and returns one scalar per row, ``[B · rows_per_sample]``; the
                gradient of their sum is what is projected, and none that it computes on the way.
            num_samples: ``B``.

        Returns:
            ``[B, K]`` float32 (float64 for a float64 model).

        Raises:
            ValueError: ``outputs`` returned another shape.
            RuntimeError: rows of a module are not those of single samples; or see `batch`.

        Warns:
            UserWarning: modules draw random numbers in training mode, so that features differ from
                call to call (once, naming one); or rows could not be checked.
        """
        with self.batch(num_samples) as features:
            assert self._batch is not None
            self._batch.guesses = self.check_rows and num_samples > 1
            # gradients that it takes on the way are not those of its result
            self._batch.counts = False
            f = self._run(outputs, self._batch)
            self._batch.counts = True
            rows = num_samples * self.rows_per_sample
            if not isinstance(f, Tensor):
                raise ValueError(f"outputs must return a tensor, got {type(f).__name__}")
            if f.shape != (rows,):
                raise ValueError(
                    f"outputs must return one scalar per row, [{rows}], got {list(f.shape)}"
                    + wrong_outputs(f, num_samples, self.rows_per_sample)
                )
            if rows and not f.requires_grad:
                raise RuntimeError(
                    "outputs must depend on the chosen parameters, got a result without gradient: "
                    "was it computed under no_grad, or detached?"
                )
            if rows:
                self._differentiate(f, self._batch)
        return features

    def plan(
        self,
        outputs: Callable[[], Any],
        num_samples: int,
        *,
        memory_budget: int | None = None,
    ) -> Plan:
        """What `sketch` would do for such a batch: print it.

        Runs the forward once, without gradients, and once, with its backward, on tensors that have
        shapes and no values, which costs next to nothing. A model on the meta device is planned as
        well: attention is taken to be fused there, as on a card.

        Args:
            outputs: as `sketch`; what it returns is not looked at.
            num_samples: ``B``.
            memory_budget: bytes that weights, activations, features and workspace have to fit in;
                the plan says what does not, and a batch that does.

        Returns:
            A `Plan`: per layer its kind, shapes, FLOP, bytes and kernel. ``str`` makes a table.

        Raises:
            ValueError: the budget or ``num_samples`` is not a positive int.
        """
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an int of at least 1, got {num_samples!r}")
        if memory_budget is not None and memory_budget < 1:
            raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")
        plan = make_plan(
            [(layer.name, layer.module, layer.owned) for layer in self._layers],
            self.parameter_names,
            self.into,
            outputs,
            num_samples,
            self.rows_per_sample,
            num_samples * self.proj_dim * self.dtype.itemsize,
            memory_budget,
            keeps_inputs=self._norms is not None,
            whitening=self.whitening,
            whitened=self._whitened,
        )
        try:
            memory, unknown = self._simulate(outputs, num_samples, plan), ""
        except Exception as error:
            # whatever the caller's code does with values that are not there
            first = str(error).partition("\n")[0]
            memory, unknown = None, f"{type(error).__name__}: {first}"
        return replace(plan, weight_bytes=weight_bytes(self.model), memory=memory, unknown=unknown)

    def _simulate(self, outputs: Callable[[], Any], num_samples: int, plan: Plan) -> BatchMemory:
        """The memory of a batch, by a forward and backward of shapes alone."""
        modules = {layer.name: layer.weighing or layer.module for layer in self._layers}
        work, kept = dict.fromkeys(modules.values(), 0), dict.fromkeys(modules.values(), 0)
        for layer in plan.layers:
            module = modules[layer.name]
            work[module] = max(work[module], layer.work_bytes)
            kept[module] = max(kept[module], layer.kept_bytes)
        on_meta = self.device.type == "meta"
        mode = None if on_meta else FakeTensorMode(allow_non_fake_inputs=True)
        meter = ShapeMeter(mode)
        before = self._accumulator, self._norms, self._last_norms, self._watched_randomness
        planned = PlannedAccumulator(self.into, self._norms is not None, work, kept)
        self._accumulator, self._norms, self._watched_randomness = planned, None, True
        self._planned = planned
        try:
            with (
                torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
                torch.enable_grad(),
                mode or nullcontext(),
                fused_attention(),
                meter,
                self.batch(num_samples) as features,
            ):
                batch = self._batch
                assert batch is not None
                batch.guesses = self.check_rows and num_samples > 1
                made = outputs()
                activation_bytes = meter.live_bytes - features.nbytes
                sums = [
                    leaf.sum()
                    for leaf in tree_leaves(made)
                    if isinstance(leaf, Tensor) and leaf.requires_grad
                ]
                del made
                for index, part in enumerate(sums, start=1):
                    with leaves_kept(part.grad_fn):
                        part.backward(retain_graph=index < len(sums))
                checkpointed, reentrant = batch.dropped, len(batch.without_grad)
            # the end of a batch sketches what has waited for it
            return BatchMemory(
                activation_bytes, meter.peak_bytes, checkpointed + reentrant, reentrant
            )
        finally:
            self._accumulator, self._norms, self._last_norms, self._watched_randomness = before
            self._planned = None

    def _run(self, outputs: Callable[[], Tensor], batch: _Batch) -> Tensor:
        try:
            return outputs()
        except Exception as error:
            shared = [name for name, (_, rows) in batch.unusual.items() if rows.shared]
            if shared:
                error.add_note(
                    f"module {shared[0]!r} ran once for the whole batch, so its output was given a "
                    "row for every sample; where that does not fit, leave its parameters out with "
                    "parameters="
                )
            raise

    def _differentiate(self, f: Tensor, batch: _Batch) -> None:
        """The backward; before it one that checks rows of layers where that was not done yet."""
        names = batch.seen | batch.without_grad
        checked = self._checked.setdefault(batch.rows, set())
        if not batch.guesses or (names <= checked and not batch.unusual):
            f.sum().backward()
            return
        # first, because the other one lets go of activations on its way
        batch.check, batch.counts = RowCheck(batch.num_samples, f.device), False
        weights = batch.check.weights(batch.rows).to(f.dtype)
        devices = [f.device] if f.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), leaves_kept(f.grad_fn):
                f.backward(weights, retain_graph=True)
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
            warnings.warn(
                f"rows were not checked, they are told by their number alone: {cause}",
                stacklevel=3,
            )
        batch.check.go_on()
        batch.counts = True
        try:
            f.sum().backward()
        except RuntimeError as error:
            error.add_note(f"in the {_SECOND}")
            raise
        if batch.check.has_lost_samples():
            warnings.warn(
                f"every other sample has no gradient in the {_SECOND}",
                stacklevel=3,
            )
        wrong = batch.check.first_wrong()
        if wrong is not None:
            raise RuntimeError(wrong_rows(*wrong, f))
        checked |= batch.seen | batch.without_grad
        for layer, rows in batch.unusual.values():
            place = rows.outputs[0]
            assert place is not None
            layer.shared |= rows.shared
            layer.sample_dim = place.dim
            if place.dim == 0 and not rows.shared:
                layer.finer.add(place.per_sample)

    @contextmanager
    def batch(self, num_samples: int) -> Iterator[Tensor]:
        """Within it, forwards and backwards of the model add to the ``[B, K]`` features it yields.

        Args:
            num_samples: ``B``; every forward has ``B · rows_per_sample`` rows, sample by sample.

        Yields:
            ``[B, K]``, zeros at first, complete when the block ends.

        Raises:
            RuntimeError: a module saw another number of rows, its input was changed in place after
                its forward, it ran without gradient, it returned something other than tensors,
                it was replaced or is watched by another sketcher, or a parameter was used outside
                the module that owns it. The message names it. Or a backward made a graph.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
            raise ValueError(f"num_samples must be an int of at least 0, got {num_samples!r}")
        if self._batch is not None:
            raise RuntimeError("a batch of this sketcher is open already")
        self._refuse_mixing()
        check_places(self._places)
        for layer in self._layers:
            if isinstance(vars(layer.module).get("forward"), Watched):
                raise RuntimeError(
                    f"{layer.title} is watched by an open batch of another sketcher: one at a time"
                )
        features = torch.zeros(num_samples, self.proj_dim, dtype=self.dtype, device=self.device)
        batch = _Batch(
            features,
            num_samples * self.rows_per_sample,
            self.rows_per_sample,
            features.new_zeros((), requires_grad=True),
        )
        self._last_norms = None
        chosen = {id(parameter) for parameter in self._parameters}
        before = [(parameter, parameter.requires_grad) for parameter in self._model_parameters]
        grads = [parameter.grad for parameter in self._parameters]
        watched: dict[nn.Module, Any] = {}
        self._frozen = [0] * len(self._parameters)
        try:
            self._batch = batch
            self._accumulator.open(features)
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            for parameter in self._parameters:
                parameter.grad = None
            for layer in self._layers:
                layer.depth = 0
                forward = self._watch(layer, batch)
                watched[layer.module] = vars(layer.module).get("forward")
                vars(layer.module)["forward"] = forward
            with self._random_modules_named():
                yield batch.features
            for name, parameter in zip(self.parameter_names, self._parameters, strict=True):
                # frozen wherever its module runs, it has a gradient from elsewhere
                if parameter.grad is not None:
                    raise RuntimeError(
                        f"parameter {name!r} is used outside the forward of the module that owns "
                        "it, so its per-sample gradient cannot be seen: leave it out with "
                        "parameters="
                    )
            missed = sorted(batch.without_grad - batch.seen)
            if missed:
                raise RuntimeError(
                    f"module {missed[0]!r} ran without gradient (under no_grad, or in a re-entrant "
                    "checkpoint none of whose inputs needs one): its gradient would be missing"
                )
            unchecked = batch.seen - self._checked.get(batch.rows, set())
            if unchecked and self.check_rows and num_samples > 1 and not batch.guesses:
                self._tell_unchecked(unchecked)
            self._accumulator.close(features)
            if self._norms is not None:
                self._last_norms = self._norms.norms()
        finally:
            self._batch = None
            self._accumulator.forget()
            for module, own in watched.items():
                vars(module).pop("forward", None)
                # one that the instance had, not its class
                if own is not None:
                    vars(module)["forward"] = own
            for parameter, flag in before:
                parameter.requires_grad_(flag)
            for parameter, grad in zip(self._parameters, grads, strict=True):
                parameter.grad = grad

    def _tell_unchecked(self, names: set[str]) -> None:
        """Warn, once, that a batch of the caller's own backwards was not checked."""
        if self._told_unchecked:
            return
        self._told_unchecked = True
        warnings.warn(
            f"rows of {len(names)} layers are told by their number alone, a batch whose backward "
            "is the caller's cannot check them: sketch does, and check_rows=False takes them as "
            "they are",
            stacklevel=4,
        )

    @contextmanager
    def _random_modules_named(self) -> Iterator[None]:
        """Warns, after the first batch in training mode, of modules that draw random numbers."""
        if self._watched_randomness or not any(m.training for m in self._modules):
            yield
            return
        with RandomnessWatch(self.model, self.device) as watch:
            yield
        self._watched_randomness = True
        if line := watch.warning():
            # past this, batch, contextlib and the caller's with, or sketch
            warnings.warn(line, stacklevel=5)

    def _refuse_mixing(self) -> None:
        for name, module in self._normalisations:
            if module.training or not module.track_running_stats:
                raise ValueError(
                    f"module {name or 'the model itself'!r} ({type(module).__name__}) normalises "
                    "over the batch, so samples have no gradient of their own: put the model in "
                    "eval mode or replace the module"
                )

    def _watch(self, layer: Layer, batch: _Batch) -> Callable[..., Any]:
        """The module's forward, and what is kept of it for the backward.

        It takes the forward's place, because hooks before and after it cost twice as much.
        """
        module, forward, rule = layer.module, layer.module.forward, own_rule(layer.module)
        owned = [
            (*registered_at(module, path), index, self._parameters[index])
            for path, index in layer.owned.items()
        ]

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._recomputing or self._batch is not batch:
                return forward(*args, **kwargs)
            for table, key, _, parameter in owned:
                # a functional call put another in its place, whose gradient is not asked for
                if table.get(key) is not parameter:
                    return forward(*args, **kwargs)
            seen = Seen(layer, args, kwargs)
            layer.depth += 1
            for _, _, index, parameter in owned:
                self._frozen[index] += 1
                parameter.requires_grad_(False)
            try:
                output = forward(*args, **kwargs)
            finally:
                layer.depth -= 1
                for _, _, index, parameter in owned:
                    self._frozen[index] -= 1
                    # a parent that owns the same parameter may still be running
                    if self._frozen[index] == 0:
                        parameter.requires_grad_(True)
            # a module that calls itself is recomputed as a whole, by its outermost call
            if layer.depth or is_discrete(output):
                return output
            if not torch.is_grad_enabled():
                batch.without_grad.add(layer.name)
                return output
            seen.check()
            if not isinstance(output, Tensor):
                returned, parts, numbers = tensors_of(layer, output)
                outputs = [returned[number] for number in numbers]
                for number, out in zip(
                    numbers, self._observe(seen, outputs, None, batch), strict=True
                ):
                    returned[number] = out
                return tree_unflatten(returned, parts)
            applies = rule is not None and rule_applies(module, args, kwargs)
            (out,) = self._observe(seen, [output], rule if applies else None, batch)
            return out

        replacement = Watched(watched)
        replacement.__wrapped__ = forward
        return replacement

    def _observe(
        self, seen: Seen, outputs: list[Tensor], rule: Rule | None, batch: _Batch
    ) -> Sequence[Tensor]:
        """What takes the place of a forward's outputs, with a hook where their gradients arrive.

        Args:
            seen: of the forward.
            outputs: tensors with a gradient that it returned.
            rule: the one that applies, if any does; of one output.
            batch: the open one.
        """
        layer, first_of_batch = seen.layer, not batch.seen
        batch.seen.add(layer.name)
        if batch.rows == 0:
            return [output + batch.anchor.to(output.dtype) for output in outputs]
        rows = find_rows(
            seen, outputs, rule is not None, batch.rows, batch.num_samples, batch.guesses
        )
        if rows is None:
            raise RuntimeError(
                missing_rows(seen, outputs, batch.rows, batch.rows_per_sample, first_of_batch)
            )
        if batch.num_samples > 1 and rows.is_unusual(layer, batch.rows_per_sample):
            batch.unusual[layer.name] = layer, rows
        if self._accumulator.counts_uses:
            self._accumulator.expect(layer.owned.values())
        kept = [x.detach() for x in seen.inputs]
        if rows.shared:
            outputs = [repeat_rows(outputs[0], seen.inputs[0], batch.rows)]
            kept = [repeat_rows(kept[0], seen.inputs[0], batch.rows)]
        if len(outputs) > 1:
            outputs = gate(batch.anchor, outputs)
        else:
            outputs = [fresh(outputs[0], batch.anchor)]
        if rule is not None:
            kept = self._kept(layer, kept, outputs[0], rows)
        batch.dropped += saving_is_hooked() and torch._C._current_graph_task_id() == -1
        call = Call(seen, rule, kept, outputs, rows, batch.anchor)
        node: Any = outputs[0].grad_fn
        # a hook of the node comes after those that the caller puts on the tensor
        node.register_prehook(partial(self._receive, call, [x.output_nr for x in outputs]))
        return outputs

    def _kept(
        self, layer: Layer, kept: list[Tensor], output: Tensor, rows: CallRows
    ) -> list[Tensor]:
        """What a rule needs of a layer's input, samples first."""
        (x,), (place,) = kept, rows.outputs
        if place is not None and place.dim == 1:
            x = x.transpose(0, 1)
        if layer.weighing is not None:
            # what the layer multiplied, where autocast rounded its input
            x = x.to(output.dtype) if x.is_floating_point() else x
            x = positions_last(x) if layer.weighing is not layer.module else x
            return [self._accumulator.keep(layer.owned["weight"], layer.weighing, x)]
        return [x] if saving_is_hooked() else [x, *kept_statistics(output)]

    def _receive(self, call: Call, numbers: list[int], grads: tuple[Tensor | None, ...]) -> None:
        output_grads = [grads[number] for number in numbers]
        some = next((x for x in output_grads if x is not None), None)
        if some is None:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward inside a batch must not have create_graph=True: a gradient of its "
                f"gradients with respect to {call.layer.title} would be missing"
            )
        batch = self._batch
        if batch is None or batch.anchor is not call.anchor:
            raise RuntimeError("backward must run inside the batch its forward ran in")
        if batch.num_samples > 1:
            for number, (grad, rows) in enumerate(
                zip(output_grads, call.rows.outputs, strict=True)
            ):
                if grad is not None and rows is None:
                    raise RuntimeError(
                        f"output {number} of {call.layer.title} has no rows of the batch, "
                        f"{list(grad.shape)}, and a gradient: work shared between samples has no "
                        "per-sample gradient: sketch one sample at a time, or leave its "
                        "parameters out with parameters="
                    )
                if grad is not None and rows is not None and batch.check is not None:
                    batch.check.see(call.layer, number, grad, rows.dim)
        if batch.counts:
            device_type = autocast_type(some)
            # the usual case; entering a context takes as long as many a layer
            if not torch.is_autocast_enabled(device_type):
                self._add(batch, call, output_grads)
            else:
                # the caller may run the backward inside autocast too, which would round the
                # products
                with torch.autocast(device_type, enabled=False):
                    self._add(batch, call, output_grads)
        elif batch.check is None:
            return
        else:
            # a checkpoint that has made it again holds it until it is asked for
            call.get()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            call.release()

    def _add(self, batch: _Batch, call: Call, output_grads: list[Tensor | None]) -> None:
        layer, features = call.layer, batch.features
        # a checkpoint makes it again by forwards that are watched
        kept = call.get()
        if self._accumulator.counts_uses:
            for index in set(layer.owned.values()):
                self._accumulator.begin(index)
        if call.rule is None:
            self._recomputing = True
            try:
                for index, sample, grad in call.recomputed_grads(
                    kept, output_grads, batch.num_samples, self._planned is not None
                ):
                    self._accumulator.add_whole(
                        index, grad[None].to(features.dtype), features, slice(sample, sample + 1)
                    )
            finally:
                self._recomputing = False
            return
        x, *statistics = kept
        (grads,), (rows,) = output_grads, call.rows.outputs
        assert grads is not None
        assert rows is not None
        if rows.dim == 1:
            grads = grads.transpose(0, 1)
        if layer.weighing is not None:
            streamed = grads if layer.weighing is layer.module else positions_last(grads)
            self._accumulator.add_weight(
                layer.owned["weight"],
                LayerGradient(layer.weighing, x, streamed, rows.per_sample),
                features,
            )
        whole = slice(0, len(features))
        for attribute, of_parameter in call.rule(
            layer.module, x, grads.to(features.dtype), rows.per_sample, *statistics
        ):
            if attribute in layer.owned:
                self._accumulator.add_whole(layer.owned[attribute], of_parameter, features, whole)

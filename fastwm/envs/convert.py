"""From gymnasium spaces to ours: flattening, dtypes, image layout, action bounds.

Both directions work on batches, so that an adapter of N environments converts once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from fastwm.envs.base import RESERVED, EnvOptionError, EnvSpaceError, check_action
from fastwm.spaces import Space

MIN_SIDE = 16  # px; a smaller uint8 grid is data (a board, a MiniGrid view), not a picture
MAX_CHANNELS = 16
MAX_CLASSES = 4096  # widest one-hot that a network reads


@dataclass(frozen=True)
class ObsOptions:
    """How observations are converted.

    size: (H, W) that images are resized to; None keeps them.   gray: one channel of luminance.
    image_layout: "auto", "hwc" or "chw".   ignore: names of observations to leave out.
    """

    size: tuple[int, int] | None = None
    gray: bool = False
    image_layout: str = "auto"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = self.size
        if isinstance(size, int):
            size = (size, size)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise EnvOptionError(f"envs: expected size to be (H, W), got {self.size!r}")
        object.__setattr__(self, "size", None if size is None else (int(size[0]), int(size[1])))
        if self.image_layout not in ("auto", "hwc", "chw"):
            raise EnvOptionError(
                f"envs: expected image_layout to be 'auto', 'hwc' or 'chw', got "
                f"{self.image_layout!r}"
            )
        ignore = (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
        object.__setattr__(self, "ignore", ignore)


def kind_of(space: Any) -> str:
    """Class name of the gymnasium space that this one is or derives from."""
    known = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple")
    return next((c.__name__ for c in type(space).__mro__ if c.__name__ in known), "other")


def leaves(space: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, space) of every leaf below nested Dict and Tuple spaces, in the spaces' order."""
    kind = kind_of(space)
    if kind == "Dict":
        for key, child in space.spaces.items():
            yield from leaves(child, (*path, key))
    elif kind == "Tuple":
        for index, child in enumerate(space.spaces):
            yield from leaves(child, (*path, index))
    else:
        yield path, space


def _reach(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# ------------------------------------------------------------------------------------ observations


class ObsMap:
    """Turns batched observations of a gymnasium space into a flat dict of arrays.

    space: name -> Space. Nested names are joined with dots; a lone Box is "image" or "vector".
    bounds: name -> (low, high) of vectors, infinite where the declared ones mean nothing.
    """

    def __init__(self, who: str, space: Any, options: ObsOptions, *, copy: bool = True) -> None:
        self.space: dict[str, Space] = {}
        self.bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._leaves: list[tuple[str, tuple, Callable[[np.ndarray], np.ndarray]]] = []
        unused = set(options.ignore)
        for path, leaf in leaves(space):
            name = _leaf_name(path)
            unused.discard(name)
            if name in options.ignore:
                continue
            label = _label("observation", path)
            target, function, fresh = _obs_leaf(f"{who}: {label}", leaf, options)
            if not path:
                name = "image" if target.kind == "image" else "vector"
            if copy and not fresh:
                function = _copied(function)
            if name in self.space:
                raise EnvSpaceError(f"{who}: expected distinct names, got {name!r} twice")
            self.space[name] = target
            if target.kind == "vector" and kind_of(leaf) == "Box":
                self.bounds[name] = _declared(leaf, target.shape)
            self._leaves.append((name, path, function))
        if unused:
            raise EnvSpaceError(
                f"{who}: expected `ignore` to name observations, got {sorted(unused)}; there are "
                f"{[_leaf_name(path) for path, _ in leaves(space)]}"
            )
        if not self.space:
            raise EnvSpaceError(f"{who}: expected at least one observation, got {space}")

    def batch(self, obs: Any) -> dict[str, np.ndarray]:  # arrays (N, ...)
        """Converts an observation of all environments."""
        return {name: function(_reach(obs, path)) for name, path, function in self._leaves}

    @property
    def paths(self) -> list[tuple]:
        """Where the observations lie in nested spaces."""
        return [path for _, path, _ in self._leaves]

    def flat(self, arrays: dict[tuple, np.ndarray]) -> dict[str, np.ndarray]:  # (N, ...) by path
        """`batch` of what is not nested any more."""
        return {name: function(arrays[path]) for name, path, function in self._leaves}

    def stack(self, observations: Sequence[Any]) -> dict[str, np.ndarray]:
        """Converts a list of observations, one per environment."""
        return {
            name: function(np.stack([np.asarray(_reach(obs, path)) for obs in observations]))
            for name, path, function in self._leaves
        }


def _declared(leaf: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A Box's bounds; the smallest and largest numbers of a type stand for undeclared ones."""
    sides = []
    for side, free in ((leaf.low, -np.inf), (leaf.high, np.inf)):
        side = np.asarray(side, np.float64).reshape(shape)
        size = np.abs(side)
        sides.append(np.where((size > 1e30) | ((size > 0) & (size < 1e-30)), free, side))
    return sides[0], sides[1]


def _leaf_name(path: tuple) -> str:
    name = ".".join(str(key) for key in path) or "vector"
    # The replay has columns of its own under these names.
    return f"obs_{name}" if name in RESERVED or name.startswith(("is_", "reward")) else name


def _label(what: str, path: tuple) -> str:
    """How an error names a leaf: "action 'arm.joint'", or "action" where it is the only one."""
    return f"{what} {'.'.join(str(key) for key in path)!r}" if path else what


def _copied(function: Callable) -> Callable:
    return lambda x: np.array(function(x))


def _obs_leaf(who: str, leaf: Any, options: ObsOptions) -> tuple[Space, Callable, bool]:
    """(Space, conversion of a batch, whether its result is always a new array)."""
    kind = kind_of(leaf)
    if kind == "Box":
        if np.dtype(leaf.dtype) == np.uint8:
            order = _image_axes(who, tuple(leaf.shape), options.image_layout)
            if order is not None:
                return _image_leaf(tuple(leaf.shape), order, options)
        if np.dtype(leaf.dtype).kind not in "fiub":
            raise EnvSpaceError(f"{who}: expected numbers, got dtype {leaf.dtype}")
        shape = tuple(leaf.shape) or (1,)
        if prod(shape) == 0:
            raise EnvSpaceError(f"{who}: expected a non-empty Box, got shape {tuple(leaf.shape)}")
        return Space("vector", shape), _to_float(shape), np.dtype(leaf.dtype) != np.float32
    if kind == "MultiBinary":
        shape = tuple(int(n) for n in leaf.shape)
        return Space("vector", shape), _to_float(shape), True
    if kind in ("Discrete", "MultiDiscrete"):
        classes, start = _classes(leaf)
        if sum(classes) > MAX_CLASSES:
            raise EnvSpaceError(
                f"{who}: expected at most {MAX_CLASSES} classes to write as one-hot, got "
                f"{sum(classes)}; convert it in a gymnasium.ObservationWrapper, or leave it out "
                "with the option `ignore`"
            )
        shape = () if kind == "Discrete" else tuple(leaf.nvec.shape)
        return Space("discrete", shape, classes), _to_index(shape, start), True
    raise EnvSpaceError(
        f"{who}: expected Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple, got "
        f"{type(leaf).__name__}; leave it out with the option `ignore`, or convert it in a "
        "gymnasium.ObservationWrapper"
    )


def _to_float(shape: tuple[int, ...]) -> Callable:
    def convert(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, dtype=np.float32).reshape(len(x), *shape)

    return convert


def _classes(leaf: Any) -> tuple[tuple[int, ...], np.ndarray]:
    """Class counts of a Discrete or MultiDiscrete space, flat, and the value of its first class."""
    counts = np.asarray(leaf.n if kind_of(leaf) == "Discrete" else leaf.nvec).reshape(-1)
    start = np.broadcast_to(np.asarray(getattr(leaf, "start", 0)).reshape(-1), counts.shape)
    return tuple(int(n) for n in counts), start.astype(np.int64)


def _to_index(shape: tuple[int, ...], start: np.ndarray) -> Callable:
    """Classes counted from 0."""
    start = start.reshape(shape)

    def convert(x: np.ndarray) -> np.ndarray:
        return (np.asarray(x).reshape(len(x), *shape) - start).astype(np.int32)

    return convert


def _image_axes(who: str, shape: tuple[int, ...], layout: str) -> str | None:
    """Order of the axes: hwc, chw, hw or shwc (a stack); None for what is no picture."""
    if len(shape) == 2:
        return "hw" if min(shape) >= MIN_SIDE else None
    if len(shape) == 4 and shape[3] in (1, 3) and min(shape[1:3]) >= MIN_SIDE:
        return "shwc"
    if len(shape) != 3:
        return None
    if layout != "auto":
        sides = shape[:2] if layout == "hwc" else shape[1:]
        if min(sides) < MIN_SIDE <= max(shape):
            raise EnvSpaceError(
                f"{who}: expected an image of layout {layout}, got shape {shape}; its sides would "
                f"be {sides}"
            )
        return layout if min(sides) >= MIN_SIDE else None
    last = shape[2] <= MAX_CHANNELS and min(shape[:2]) >= MIN_SIDE
    first = shape[0] <= MAX_CHANNELS and min(shape[1:]) >= MIN_SIDE
    if last != first:
        return "hwc" if last else "chw"
    if sorted(shape)[1] < MIN_SIDE:
        return None
    raise EnvSpaceError(
        f"{who}: expected an image of shape (H, W, C) or (C, H, W) with at most {MAX_CHANNELS} "
        f"channels, got {shape}; set the option image_layout to 'hwc' or 'chw'"
    )


def _image_leaf(shape: tuple[int, ...], order: str, options: ObsOptions) -> tuple:
    """uint8 pictures as (H, W, C), resized and grayed where asked for."""
    sizes = dict(zip(order, shape, strict=True))
    height, width = sizes["h"], sizes["w"]
    channels = sizes.get("c", 1) * sizes.get("s", 1)
    gray = options.gray and channels % 3 == 0
    size = options.size or (height, width)

    def convert(x: np.ndarray) -> np.ndarray:
        if order == "chw":
            x = _channels_last(x)
        elif order == "shwc":
            x = x.transpose(0, 2, 3, 1, 4)
        x = x.reshape(len(x), height, width, channels)
        x = to_gray(x) if gray else x
        x = resize(x, size) if size != (height, width) else x
        return np.ascontiguousarray(x)

    fresh = order == "chw" or gray or size != (height, width)
    return Space("image", (*size, channels // 3 if gray else channels)), convert, fresh


def _channels_last(x: np.ndarray) -> np.ndarray:  # (N, C, H, W) -> (N, H, W, C)
    """A new array; plane by plane is 3 to 4 times faster than copying a transposed view."""
    out = np.empty((len(x), *x.shape[2:], x.shape[1]), x.dtype)
    for channel in range(x.shape[1]):
        out[..., channel] = x[:, channel]
    return out


def to_gray(x: np.ndarray) -> np.ndarray:  # (N, H, W, 3k) uint8 -> (N, H, W, k) uint8
    """ITU-R 601 luminance in integers: (77 R + 150 G + 29 B) / 256, rounded."""
    x = x.reshape(*x.shape[:-1], x.shape[-1] // 3, 3).astype(np.uint16)
    return ((77 * x[..., 0] + 150 * x[..., 1] + 29 * x[..., 2] + 128) >> 8).astype(np.uint8)


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (N, H, W, C) -> (N, H', W', C)
    """Bilinear with antialiasing (the triangle filter grows with the scale), on uint8."""
    import torch

    batch = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous().numpy()


# ----------------------------------------------------------------------------------------- actions


class ActMap:
    """Turns our actions, checked, into batches of a gymnasium action space.

    space: all leaves discrete -> one (multi-)discrete Space; all Box -> one continuous Space.
    bounds: (low, high), numbers or arrays, in place of the bounds that a Box declares.
    """

    def __init__(self, who: str, space: Any, num_envs: int, bounds: Any = None) -> None:
        self.who, self.num_envs, self._native = who, num_envs, space
        found = list(leaves(space))
        boxes = [_leaf_name(path) for path, leaf in found if kind_of(leaf) == "Box"]
        for path, leaf in found:
            if kind_of(leaf) == "other":
                raise EnvSpaceError(
                    f"{who}: expected {_label('action', path)} to be Box, Discrete, "
                    f"MultiDiscrete or MultiBinary, got {type(leaf).__name__}; convert it in a "
                    "gymnasium.ActionWrapper"
                )
        if boxes and len(boxes) < len(found):
            raise EnvSpaceError(
                f"{who}: expected actions that are all discrete or all continuous, got continuous "
                f"{boxes} among {[_leaf_name(path) for path, _ in found]}; fix one kind in a "
                "gymnasium.ActionWrapper"
            )
        if not found:
            raise EnvSpaceError(f"{who}: expected at least one action, got {space}")
        self._flat = len(found) == 1 and not found[0][0]
        make = _continuous if boxes else _discrete
        self.space, self._functions = make(who, found, bounds, self._flat)

    def batch(self, action: np.ndarray, count: int | None = None) -> Any:  # (N, *space.shape)
        """The checked action in the native form: an array, or nested dicts and tuples of arrays.

        count: how many environments it is for, where it is not for all of them.
        """
        count = self.num_envs if count is None else count
        action = check_action(self.who, self.space, count, action)
        if self._flat:
            return self._functions[0](action)
        functions = iter(self._functions)
        return self._build(self._native, action, functions)

    def _build(self, space: Any, action: np.ndarray, functions: Iterator[Callable]) -> Any:
        kind = kind_of(space)
        if kind == "Dict":
            return {k: self._build(s, action, functions) for k, s in space.spaces.items()}
        if kind == "Tuple":
            return tuple(self._build(s, action, functions) for s in space.spaces)
        return next(functions)(action)


def pick(tree: Any, index: int) -> Any:
    """Element `index` of every array in nested dicts and tuples."""
    if isinstance(tree, dict):
        return {key: pick(child, index) for key, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(pick(child, index) for child in tree)
    return tree[index]


def _discrete(who: str, found: list, bounds: Any, flat: bool) -> tuple[Space, list[Callable]]:
    if bounds is not None:
        raise EnvSpaceError(f"{who}: expected `bounds` for continuous actions, got discrete ones")
    classes: list[int] = []
    functions = []
    for path, leaf in found:
        kind = kind_of(leaf)
        if kind == "MultiBinary":
            shape = tuple(int(n) for n in leaf.shape)
            counts, start = (2,) * prod(shape), np.zeros(prod(shape), np.int64)
        else:
            shape = () if kind == "Discrete" else tuple(leaf.nvec.shape)
            counts, start = _classes(leaf)
        if not counts or min(counts) < 1:
            label = _label("action", path)
            raise EnvSpaceError(f"{who}: expected choices in {label}, got {leaf}")
        columns = None if flat else slice(len(classes), len(classes) + len(counts))
        functions.append(_shift(columns, shape, start.reshape(shape), np.dtype(leaf.dtype)))
        classes += counts
        ours = shape if flat else (len(classes),)
    return Space("discrete", ours, tuple(classes)), functions


def _shift(columns: slice | None, shape: tuple, start: np.ndarray, dtype: np.dtype) -> Callable:
    if columns is None and not start.any():
        return lambda action: action.astype(dtype)

    def convert(action: np.ndarray) -> np.ndarray:
        part = action if columns is None else action[:, columns]
        return (part.reshape(len(action), *shape) + start).astype(dtype)

    return convert


def _continuous(who: str, found: list, bounds: Any, flat: bool) -> tuple[Space, list[Callable]]:
    width, functions = 0, []
    total = sum(prod(leaf.shape) for _, leaf in found)
    for path, leaf in found:
        size = prod(leaf.shape)
        low, high = _bounds(f"{who}: {_label('action', path)}", leaf, bounds, width, total)
        columns = slice(width, width + size)
        functions.append(_rescale(columns, tuple(leaf.shape), low, high, np.dtype(leaf.dtype)))
        width += size
    if width == 0:
        raise EnvSpaceError(f"{who}: expected a non-empty action Box, got {[s for _, s in found]}")
    return Space("continuous", (width,)), functions


def _rescale(
    columns: slice, shape: tuple, low: np.ndarray, high: np.ndarray, dtype: np.dtype
) -> Callable:
    """Clip to [-1, 1], then map -1 to low and 1 to high, never outside."""
    whole = dtype.kind in "iu"
    plain = bool((low == -1).all() and (high == 1).all()) and not whole
    work = dtype if dtype == np.float64 else np.dtype(np.float32)
    half = ((high - low) / 2).astype(work)
    low, high = low.astype(work), high.astype(work)

    def convert(action: np.ndarray) -> np.ndarray:
        part = np.minimum(np.maximum(action[:, columns], -1), 1).astype(work, copy=False)
        if not plain:
            part = np.minimum(low + (part + 1) * half, high)
            part = np.rint(part) if whole else part
        return part.reshape(len(action), *shape).astype(dtype, copy=False)

    return convert


def _bounds(
    who: str, leaf: Any, bounds: Any, offset: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Flat float64 (low, high) of a Box, refusing bounds that mean nothing."""
    if bounds is not None:
        pair = [np.asarray(side, np.float64) for side in bounds]
        if len(pair) != 2 or any(side.size not in (1, total) for side in pair):
            raise EnvSpaceError(
                f"{who}: expected bounds (low, high) of 1 or {total} numbers each, got {bounds}"
            )
        pair = [np.broadcast_to(side.reshape(-1), (total,)) for side in pair]
        low, high = (side[offset : offset + prod(leaf.shape)] for side in pair)
    else:
        low = np.asarray(leaf.low, np.float64).reshape(-1)
        high = np.asarray(leaf.high, np.float64).reshape(-1)
    for side in (low, high):
        size = np.abs(side)
        if not np.isfinite(side).all() or (size > 1e6).any() or ((0 < size) & (size < 1e-30)).any():
            raise EnvSpaceError(
                f"{who}: expected finite bounds to scale from [-1, 1], got {leaf}; "
                "give the true ones with the option bounds=(low, high)"
            )
    if not (low < high).all():
        raise EnvSpaceError(f"{who}: expected low < high, got low {low} and high {high} in {leaf}")
    return low, high

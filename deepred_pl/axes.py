"""The axes of stored arrays, named by OME's letters.

Y and X are those of an image; C, and S for samples of one pixel, are its channels. An index along
every other axis, such as T (time), Z (depth) or Q (unknown), chooses another image: a page. Pages
are counted in the order in which they are stored.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Page = int | Literal["all"] | None  # None is the only one; "all" are channels of one image

CHANNELS = "CS"
OF_A_PAGE = "YX" + CHANNELS
MOST_COLOURS = 4  # channels of a usual image


def of_page(axes: str) -> str:
    """The axes of one page."""
    return "".join(axis for axis in axes if axis in OF_A_PAGE)


def count_pages(axes: str, shape: Sequence[int]) -> int:
    """The number of pages of an array with these axes."""
    return math.prod(n for axis, n in zip(axes, shape, strict=True) if axis not in OF_A_PAGE)


def check_axes(axes: str, shape: Sequence[int], name: str) -> str:
    """The axes in capital letters.

    Raises:
        ValueError: They do not describe an array of this shape.
    """
    letters = axes.upper()
    known = letters.isalpha() and len({*letters}) == len(letters) and {*"YX"} <= {*letters}
    if not known or len(letters) != len(shape):
        raise ValueError(
            f"expected one letter for each axis of {name}, which is {tuple(shape)}, Y and X among "
            f"them, such as {_examples(len(shape))}, got {axes!r}; correct data.axes"
        )
    return letters


def guessed_axes(shape: Sequence[int], name: str) -> str:
    """The axes of an array without metadata.

    Raises:
        ValueError: They are not certain.
    """
    *others, last = shape
    if len(shape) == 2:
        return "YX"
    if len(shape) == 3:
        share = 2 if others[0] == others[1] else 4  # at most, of the sides
        if last <= MOST_COLOURS or share * last <= min(others):
            return "YXC"
    if len(shape) == 3 and shape[0] == 1:
        return "CYX"
    if len(shape) == 4 and last <= MOST_COLOURS < min(others[1:]):
        return "TYXC"
    raise ValueError(
        f"expected an image, (height, width) or (height, width, channels), got {tuple(shape)} in "
        f"{name}; set data.axes to what its axes are, such as {_examples(len(shape))}: C for "
        "channels, which are restored together, and T or Z for times or slices, one by one"
    )


def _examples(count: int) -> str:
    examples = {2: "YX", 3: "CYX, TYX or YXC", 4: "TCYX, ZYXC or TZYX", 5: "TZCYX"}
    return examples.get(count, "YX, CYX or TZCYX")


def check_page(page: Page, count: int, axes: str) -> None:
    """Refuse a page that a file with `count` of them does not have, or none of several.

    Raises:
        ValueError: The message says which there are.
    """
    if page is None and count > 1:
        raise ValueError(
            f'it has {count} pages; set data.page to one of 0 to {count - 1}, or to "all" if they '
            f"are channels of one image (axes {axes}); `deepred restore` restores all one by one"
        )
    if page != "all" and not 0 <= (page or 0) < count:
        raise ValueError(f"it has no page {page}; set data.page to one of 0 to {count - 1}")


def page_text(axes: str, page: Page, count: int) -> str:
    """A few words on what an image is of its file."""
    if axes in ("YX", "YXS"):
        return ""
    which = "all pages as channels" if page == "all" else f"page {page} (from 0) of {count}"
    return f"axes {axes}" + (f", {which}" if count > 1 else "")


def axes_of_image(axes: str, page: Page) -> str:
    """The axes of the image that is one page, or all of them."""
    return axes if page == "all" else of_page(axes)


def page_index(axes: str, shape: Sequence[int], page: Page) -> tuple[int | slice, ...]:
    """The index of a page in an array; None is that of the only one."""
    sizes = [n for axis, n in zip(axes, shape, strict=True) if axis not in OF_A_PAGE]
    if page == "all" or not sizes:
        return (slice(None),) * len(axes)
    place = iter(np.unravel_index(page or 0, sizes))
    return tuple(slice(None) if axis in OF_A_PAGE else int(next(place)) for axis in axes)


def channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    """An image with these axes as (H, W), or (H, W, C) with all but Y and X in one axis."""
    array = np.transpose(array, _channels_last(axes))
    return array.reshape(*array.shape[:2], -1) if array.ndim > 2 else array


def as_stored(image: np.ndarray, axes: str, shape: Sequence[int]) -> np.ndarray:
    """An image (H, W, C) as an array with these axes; undoes `channels_last`.

    Args:
        image: The image; H and W may be new.
        axes: The axes of the result.
        shape: The sizes of its other axes.
    """
    order = _channels_last(axes)
    sizes = [*image.shape[:2], *(shape[i] for i in order[2:])]
    return np.transpose(image.reshape(sizes), np.argsort(order))


def _channels_last(axes: str) -> list[int]:
    """The places of Y, X, and the others; by places, because a letter may come twice."""
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    return [axes.index("Y"), axes.index("X"), *others]

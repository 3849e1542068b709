"""Where features sit on the pixels of a picture: the two grids on which backbones put them.

*Corners*: feature (i, j) sits on pixel (s·i, s·j). A picture has s·k + 1 pixels along each side, and its first and last pixels
have features of their own. These are the features of the paper, and of all networks whose strided convolutions have odd
kernels with symmetric padding.

*Centres*: feature (i, j) is the middle of its own patch of s × s pixels, at (s·i + (s − 1) / 2, s·j + (s − 1) / 2). A picture
has s·k pixels along each side. These are the features of networks that cut a picture into patches, as vision transformers,
Swin and ConvNeXt do.

A resize between two such maps, or from a map to the pixels, aligns corners on the first grid and does not on the second: see
`bilinear_resize.py`. The authors know the first grid alone.
"""

from dataclasses import dataclass

Size = tuple[int, int]  # height and width


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid with a feature on every `stride`-th pixel: corners if `align_corners`, else centres. Raises ValueError.

    >>> corners, centres = Grid(16), Grid(16, align_corners=False)
    >>> corners.pixels((33, 33)), centres.pixels((32, 32))
    ((513, 513), (512, 512))
    >>> print(corners, centres, sep=", ")
    16·k + 1, 16·k
    """

    stride: int
    align_corners: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be an integer of at least 1, got {self.stride!r}")

    @property
    def name(self) -> str:
        """As people call it."""
        return "corners" if self.align_corners else "centres"

    def __str__(self) -> str:
        """What the sides of its pictures are, in pixels."""
        return f"{self.stride}·k + 1" if self.align_corners else f"{self.stride}·k"

    def features(self, size: Size) -> Size:
        """Height and width in features of the smallest map that holds a picture of this size.

        >>> Grid(16).features((513, 514)), Grid(16, align_corners=False).features((512, 513))
        ((33, 34), (32, 33))
        """
        height, width = (-(-(extent - self._border) // self.stride) + self._border for extent in size)
        return height, width

    def pixels(self, features: Size) -> Size:
        """Height and width in pixels of the picture of a map."""
        height, width = (self.stride * (extent - self._border) + self._border for extent in features)
        return height, width

    def rounded_up(self, size: Size) -> Size:
        """Height and width of the smallest picture on the grid that holds one of this size.

        >>> Grid(16).rounded_up((224, 300)), Grid(16, align_corners=False).rounded_up((224, 300))
        ((225, 305), (224, 304))
        """
        return self.pixels(self.features(size))

    def rounded_down(self, size: Size) -> Size:
        """Height and width of the largest picture on the grid within this size; at least one feature each way.

        >>> Grid(16).rounded_down((769, 520)), Grid(16, align_corners=False).rounded_down((769, 520))
        ((769, 513), (768, 512))
        """
        height, width = (max(1, (extent - self._border) // self.stride + self._border) for extent in size)
        return self.pixels((height, width))

    def has(self, size: Size) -> bool:
        """Whether a picture of this size, at least one feature each way, begins and ends on the grid."""
        return min(size) >= 1 and self.rounded_up(size) == tuple(size)

    def nearest(self, size: Size) -> Size:
        """Height and width of a picture on the grid near this size, to suggest it.

        >>> Grid(16).nearest((500, 300))
        (497, 305)
        """
        height, width = (max(1 + self._border, round((extent - self._border) / self.stride) + self._border) for extent in size)
        return self.pixels((height, width))

    def scaled(self, size: Size, scale: float) -> Size:
        """Height and width of a picture of this size once it is enlarged by `scale`: as the authors scale, or on the grid.

        >>> Grid(16).scaled((513, 513), 0.75), Grid(16, align_corners=False).scaled((512, 512), 0.7)
        ((385, 385), (352, 352))
        """
        if self.align_corners:  # `scale_dimension` of research/deeplab/core/utils.py; it need not lie on the grid
            return int((size[0] - 1) * scale + 1), int((size[1] - 1) * scale + 1)
        height, width = (self.stride * max(1, round(extent * scale / self.stride)) for extent in size)
        return height, width

    @property
    def _border(self) -> int:
        return 1 if self.align_corners else 0

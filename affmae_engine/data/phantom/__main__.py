r"""Writes a phantom to disk: `python -m affmae_engine.data.phantom --help`.

The picture in the documentation is made by

    python -m affmae_engine.data.phantom --shape 1 512 512 --pixel-nm 40 5 5 --seed 12 \
        --picture docs/pictures/phantom.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from affmae_engine import atomic
from affmae_engine.data.phantom import CLASS_NAMES, Phantom, generate, write_tiff
from affmae_engine.errors import AffmaeError

# Okabe and Ito's colours, told apart by colour-blind readers; cytoplasm stays grey.
_TINT_RGB = ((255, 255, 255), (213, 94, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178))
_LEVELS, _TINT_LEVELS = 64, 32


def write_picture(phantom: Phantom, path: Path, section: int = 0) -> None:
    """PNG of one section beside the same section tinted by class, with a palette to keep the file small.

    Raises:
        ResourceError: the file cannot be written.
    """
    image_YX, labels_YX = phantom.image_ZYX[section], phantom.labels_ZYX[section]
    plain = image_YX // (256 // _LEVELS)
    tinted = _LEVELS + labels_YX.astype(int) * _TINT_LEVELS + image_YX // (256 // _TINT_LEVELS)
    grey = np.repeat(np.linspace(0, 1, _LEVELS)[:, None], 3, 1)
    ramp = np.linspace(0, 1, _TINT_LEVELS)[:, None]
    tints = [ramp if label == 0 else 0.5 * ramp + 0.5 * np.array(rgb) / 255 for label, rgb in enumerate(_TINT_RGB)]
    palette = np.concatenate([grey, *(np.broadcast_to(t, (_TINT_LEVELS, 3)) for t in tints)])
    rule = np.full((len(image_YX), 6), _LEVELS - 1)
    picture = Image.fromarray(np.hstack([plain, rule, tinted]).astype(np.uint8))
    picture.putpalette(np.rint(255 * palette).astype(np.uint8).tobytes())
    atomic.commit_file(path, lambda partial: picture.save(partial, format="PNG", optimize=True))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m affmae_engine.data.phantom", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(16, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--pixel-nm", type=float, nargs=3, default=(40.0, 6.0, 6.0), metavar=("Z", "Y", "X"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="TIFF to write the micrographs to; needs --labels")
    parser.add_argument("--labels", type=Path, help=f"TIFF for class ids: {', '.join(CLASS_NAMES)}")
    parser.add_argument("--picture", type=Path, help="PNG of the first section, plain and tinted by class")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.labels is None):
        parser.error("--image and --labels go together")
    if options.image is None and options.picture is None:
        parser.error("nothing to write: give --image and --labels, or --picture")
    try:
        for path in (options.image, options.labels, options.picture):
            if path is not None:
                atomic.ensure_folder(path.parent)
        phantom = generate(tuple(options.shape), seed=options.seed, pixel_nm=tuple(options.pixel_nm))
        if options.image is not None:
            write_tiff(phantom, options.image, options.labels)
        if options.picture is not None:
            write_picture(phantom, options.picture)
    except AffmaeError as error:
        print(f"{error} {error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

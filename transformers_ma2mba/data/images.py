"""Image files of a data set."""

import os

from PIL import Image
from transformers.image_utils import load_image

from ..video import lacks_resources


class ImageReadError(ValueError):
    """A file that cannot be read as an image. The message names the file and the reason."""


def read_image(path: str) -> Image.Image:
    """Read an image file or URL as upright RGB.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImageReadError: if it is not an image that can be read.
    """
    if "://" not in path and not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {path}: check its path.")
    if os.path.isdir(path):
        raise ImageReadError(f"{path} is a directory: give the path of one image.")
    try:
        return load_image(path)
    except Exception as error:  # damaged files raise errors of many kinds
        if lacks_resources(error):
            raise
        reason = str(error) or type(error).__name__
        raise ImageReadError(f"{path} is not an image that can be read ({reason}).") from error

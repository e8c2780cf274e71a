from astropt_ds.data.decode import BadImageError, decode
from astropt_ds.tokens import centre_crop


def decode_centre(data, side, smallest=None, strict=False, buffer=None):
    im = decode(data)
    try:
        centre_crop(im, smallest or side)
    except ValueError as e:
        raise BadImageError(str(e)) from None
    return centre_crop(im, side)

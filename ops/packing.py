from ..quant.packing import pack, repack, unpack  # noqa: F401

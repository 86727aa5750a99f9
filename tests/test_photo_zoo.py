"""A zoo of image files: formats x orientation x alpha x depth x colour model x damage, made here.

Every file that ingest accepts decodes in both backends, to the same pixels and upright; every other one is refused with
a reason. Windows are as large as the result, so that nothing is resized: the decoders' own pixels are compared.
"""

import io
import struct
import zlib
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from harness.catalogue.images import Rejected, check_image
from harness.catalogue.pixels import plain
from harness.data.decode_dali import ImagePipeline
from harness.data.decode_pillow import ReferencePipeline, decode_rgb
from harness.data.preprocess import PreprocessSpec, draw_parameters

WIDTH, HEIGHT, SIDE = 96, 72, 64
MOST_PIXELS = 1_000_000
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def drawing(seed=0):
    """uint8 [HEIGHT, WIDTH, 3], smooth, no two regions alike."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


PIXELS = drawing()
PICTURE = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0]
ALPHA = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
DEEP = PIXELS.astype(np.uint16) * 257
ON_WHITE = np.rint((PIXELS * ALPHA[..., None].astype(float) + 255.0 * (255 - ALPHA[..., None])) / 255)


def save(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff_block(tags, order="<", link=0):
    """An EXIF block of tags (tag, type, count, 4 bytes of value)."""
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entries = b"".join(struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags)
    return magic + struct.pack(order + "IH", 8, len(tags)) + entries + struct.pack(order + "I", link)


def exif(orientation, order="<", kind=3, count=1):
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *([orientation, 0] if kind == 3 else [orientation]))
    return tiff_block([(0x010F, 2, 4, b"cam\0"), (0x0112, kind, count, value)], order)


def xmp(orientation, element=False):
    inner = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
    given = inner if element else f' tiff:Orientation="{orientation}"/>'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{given}</rdf:RDF></x:xmpmeta>'
    ).encode()


def segments(jpeg, *bodies, marker=0xE1):
    """The JPEG with further segments behind its first marker."""
    new = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for body in bodies)
    return jpeg[:2] + new + jpeg[2:]


def with_xmp(jpeg, *args):
    return segments(jpeg, b"http://ns.adobe.com/xap/1.0/\0" + xmp(*args))


def without(jpeg, *markers):
    """The JPEG without its segments of these markers."""
    place, kept = 2, jpeg[:2]
    while jpeg[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1] not in markers:
            kept += jpeg[place:end]
        place = end
    return kept + jpeg[place:]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, colour, depth=8, before=b"", after=b"", interlaced=False, header=None):
    """A PNG of integers [H, W] or [H, W, C]; `before` and `after`: chunks around the pixels."""
    height, width = values.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b""
    for top, left, down, right in passes:
        for row in values[top::down, left::right].reshape(-(-(height - top) // down), -1):
            if depth == 16:
                raw += b"\0" + row.astype(">u2").tobytes()
            else:
                bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
                raw += b"\0" + np.packbits(bits.ravel()).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def grey_tiff(values, tags):
    """An uncompressed TIFF of grey integers [H, W], with further tags as (tag, type, value)."""
    data, order = values.tobytes(), ">" if values.dtype.byteorder == ">" else "<"
    given = {256: (3, WIDTH), 257: (3, HEIGHT), 258: (3, 16), 259: (3, 1), 262: (3, 1), 277: (3, 1), 278: (3, HEIGHT)}
    given |= {273: (4, 8 + 2 + 12 * (9 + len(tags.keys() - given)) + 4), 279: (4, len(data))} | tags
    entries = [
        (tag, kind, 1, struct.pack(order + ("HH" if kind == 3 else "I"), *([value, 0] if kind == 3 else [value])))
        for tag, (kind, value) in sorted(given.items())
    ]
    return tiff_block(entries, order) + data


def raw_of(image):
    return np.asarray(image.convert("RGB")).astype(float)


def threefold(grey):
    return np.repeat(np.asarray(grey, float)[..., None], 3, axis=2)


def accepted():
    """name -> (file, its upright pixels, largest mean difference from them)."""
    jpeg = save(PICTURE, "JPEG", quality=95)
    exact, lossy, rough = 1.01, 4.0, 12.0
    zoo = {}
    for name, options in {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:2:0": {"subsampling": 2},
        "progressive": {"progressive": True},
        "optimized": {"optimize": True},
        "quality 40": {"quality": 40},
        "restarts": {"restart_marker_blocks": 2},
        "profile": {"icc_profile": bytes(300)},
        "of RGB": {"keep_rgb": True},
    }.items():
        zoo[f"jpeg {name}"] = save(PICTURE, "JPEG", **{"quality": 95, **options}), PIXELS, rough
    numbered = zoo["jpeg of RGB"][0]
    for kept, new in ((b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0"), (b"R\0G\0B\0", b"\1\0\2\0\3\0")):
        assert kept in numbered
        numbered = numbered.replace(kept, new)
    zoo["jpeg of RGB by Adobe's marker"] = segments(numbered, b"Adobe\0\x64\0\0\0\0\0", marker=0xEE), PIXELS, rough
    zoo["jpeg grey"] = save(Image.fromarray(GREY), "JPEG", quality=95), threefold(GREY), lossy
    zoo["jpeg grey progressive"] = save(Image.fromarray(GREY), "JPEG", progressive=True), threefold(GREY), lossy
    zoo["jpeg no JFIF"] = without(jpeg, 0xE0), PIXELS, lossy
    zoo["jpeg Adobe YCbCr"] = segments(without(jpeg, 0xE0), b"Adobe\0\x64\0\0\0\0\1", marker=0xEE), PIXELS, lossy
    zoo["jpeg trailing bytes"] = jpeg + bytes(500), PIXELS, lossy
    zoo["jpeg without end"] = jpeg[:-2] + b"\xff\xd9" + b"junk" * 40, PIXELS, lossy
    table = jpeg.index(b"\xff\xc4") + 1  # without it the standard table counts; DALI ends the process on such files
    zoo["jpeg with a marker 0"] = jpeg[:table] + b"\0" + jpeg[table + 1 :], PIXELS, lossy
    zoo["mpo"] = save(PICTURE, "MPO", save_all=True, append_images=[Image.fromarray(drawing(5))]), PIXELS, lossy
    ink = PICTURE.convert("CMYK")
    cmyk = save(ink, "JPEG", quality=95)
    zoo["jpeg CMYK"] = cmyk, PIXELS, lossy
    zoo["jpeg CMYK without Adobe's marker"] = without(cmyk, 0xEE), PIXELS, lossy
    zoo["tiff CMYK"] = save(ink, "TIFF"), PIXELS, lossy
    zoo["tiff YCbCr in JPEG"] = save(PICTURE.convert("YCbCr"), "TIFF", compression="jpeg", quality=95), PIXELS, lossy

    for number, turn in ORIENTATIONS.items():
        for order, word in (("<", "little"), (">", "big")):
            turned = segments(jpeg, b"Exif\0\0" + exif(number, order))
            zoo[f"jpeg EXIF {number} {word} endian"] = turned, turn(PIXELS), lossy
        zoo[f"png EXIF {number}"] = png(PIXELS, 2, before=chunk(b"eXIf", exif(number))), turn(PIXELS), exact
        zoo[f"tiff {number}"] = save(PICTURE, "TIFF", tiffinfo={0x0112: number}), turn(PIXELS), exact
        zoo[f"webp EXIF {number}"] = save(PICTURE, "WEBP", lossless=True, exif=exif(number)), turn(PIXELS), exact
    for number in (3, 6):
        turn = ORIENTATIONS[number]
        zoo[f"jpeg XMP {number}"] = with_xmp(jpeg, number), turn(PIXELS), lossy
        zoo[f"jpeg XMP element {number}"] = with_xmp(jpeg, number, True), turn(PIXELS), lossy
        zoo[f"jpeg XMP {number}, EXIF 8"] = (
            segments(with_xmp(jpeg, number), b"Exif\0\0" + exif(8)),
            ORIENTATIONS[8](PIXELS),
            lossy,
        )
        packet = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(number))
        zoo[f"png XMP {number}"] = png(PIXELS, 2, before=packet), turn(PIXELS), exact
        zoo[f"png EXIF {number} behind"] = png(PIXELS, 2, after=chunk(b"eXIf", exif(number))), turn(PIXELS), exact
        zoo[f"avif {number}"] = save(PICTURE, "AVIF", quality=95, exif=exif(number)), turn(PIXELS), lossy
    two = segments(jpeg, b"Exif\0\0" + exif(6), b"Exif\0\0" + exif(3))
    odd = {
        "orientation 0": exif(0),
        "orientation 9": exif(9),
        "no orientation": tiff_block([(0x010F, 2, 4, b"cam\0")]),
        "garbage": b"II*\0garbage" * 3,
        "empty": b"",
        "cut off": exif(1)[:20],
    }
    for name, block in odd.items():
        zoo[f"jpeg EXIF {name}"] = segments(jpeg, b"Exif\0\0" + block), PIXELS, lossy
    # DALI's own EXIF reader ends the process on this one.
    outside = tiff_block([(0x010F, 2, 0x7FFFFFFF, b"\0\xff\xff\x7f"), (0x0112, 3, 1, b"\6\0\0\0")])
    zoo["jpeg EXIF with a value outside of it"] = segments(jpeg, b"Exif\0\0" + outside), None, 0
    # Readers may differ on these: only that both backends agree is compared.
    zoo["jpeg EXIF as LONG"] = segments(jpeg, b"Exif\0\0" + exif(6, kind=4)), None, 0
    zoo["jpeg EXIF twice"] = two, None, 0
    zoo["jpeg EXIF of two values"] = segments(jpeg, b"Exif\0\0" + exif(6, count=2)), None, 0

    shown = np.dstack([PIXELS, ALPHA])
    cut = Image.fromarray(shown)
    zoo["png RGBA"] = png(shown, 6), ON_WHITE, exact
    zoo["png RGBA opaque"] = png(np.dstack([PIXELS, np.full_like(ALPHA, 255)]), 6), PIXELS, exact
    for name, colour in (("black", 0), ("white", 255), ("magenta", (255, 0, 255))):
        below = np.where(ALPHA[..., None] > 127, PIXELS, np.uint8(colour))
        hole = np.dstack([below, np.where(ALPHA > 127, 255, 0).astype(np.uint8)])
        seen = np.where(ALPHA[..., None] > 127, PIXELS, 255)
        zoo[f"png cut-out on {name}"] = png(hole, 6), seen, exact
        zoo[f"webp cut-out on {name}"] = save(Image.fromarray(hole), "WEBP", lossless=True, exact=True), seen, exact
    grey_on_white = np.rint((GREY * ALPHA.astype(float) + 255.0 * (255 - ALPHA)) / 255)
    zoo["png grey and alpha"] = png(np.dstack([GREY, ALPHA]), 4), threefold(grey_on_white), exact
    zoo["tiff RGBA"] = save(cut, "TIFF"), ON_WHITE, exact
    zoo["webp RGBA"] = save(cut, "WEBP", quality=95), ON_WHITE, lossy
    zoo["avif RGBA"] = save(cut, "AVIF", quality=95), ON_WHITE, lossy
    zoo["jp2 RGBA"] = save(cut, "JPEG2000"), ON_WHITE, exact
    few = GREY // 16
    palette = np.random.default_rng(3).integers(0, 256, (16, 3), dtype=np.uint8)
    plte, some = chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", bytes([0, 128]))
    weights = np.array([0, 128, *[255] * 14])[few][..., None]
    through = np.rint((palette[few] * weights + 255.0 * (255 - weights)) / 255)
    zoo["png palette"] = png(few, 3, before=plte), palette[few], exact
    zoo["png palette transparent"] = png(few, 3, before=plte + some), through, exact
    key = chunk(b"tRNS", struct.pack(">H", 3))
    zoo["png grey, one transparent"] = png(few, 0, before=key), threefold(np.where(few == 3, 255, few)), exact
    key = chunk(b"tRNS", struct.pack(">HHH", *PIXELS[0, 0].tolist()))
    same = (PIXELS == PIXELS[0, 0]).all(2)[..., None]
    zoo["png RGB, one transparent"] = png(PIXELS, 2, before=key), np.where(same, 255, PIXELS), exact
    gif = Image.fromarray(few).convert("P")
    gif.putpalette(palette.tobytes())
    zoo["gif"] = save(gif, "GIF"), palette[few], exact
    zoo["gif transparent"] = save(gif, "GIF", transparency=3), np.where(few[..., None] == 3, 255, palette[few]), exact
    moving = save(gif, "GIF", save_all=True, append_images=[gif.transpose(Image.Transpose.ROTATE_180)])
    zoo["gif of two frames"] = moving, palette[few], exact
    frames = [Image.fromarray(drawing(5))]
    zoo["webp of two frames"] = save(PICTURE, "WEBP", save_all=True, append_images=frames, lossless=True), PIXELS, exact
    zoo["png of two frames"] = save(PICTURE, "PNG", save_all=True, append_images=frames), PIXELS, exact

    for depth in (1, 2, 4):
        values = GREY >> (8 - depth)
        zoo[f"png grey of {depth} bits"] = png(values, 0, depth), threefold(values * (255 // (2**depth - 1))), exact
        zoo[f"png palette of {depth} bits"] = png(values, 3, depth, before=plte), palette[values], exact
    zoo["png grey"] = png(GREY, 0), threefold(GREY), exact
    zoo["png RGB"] = png(PIXELS, 2), PIXELS, exact
    zoo["png interlaced"] = png(PIXELS, 2, interlaced=True), PIXELS, exact
    gamma = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"pHYs", struct.pack(">IIB", 1, 2, 0))
    zoo["png gamma"] = png(PIXELS, 2, before=gamma), PIXELS, exact
    zoo["png profile"] = png(PIXELS, 2, before=chunk(b"iCCP", b"odd\0\0" + zlib.compress(bytes(200)))), PIXELS, exact
    zoo["png text"] = png(PIXELS, 2, before=chunk(b"tEXt", b"Comment\0none")), PIXELS, exact
    zoo["png trailing bytes"] = png(PIXELS, 2) + bytes(100), PIXELS, exact
    zoo["png grey of 16 bits"] = png(DEEP[..., 0], 0, 16), threefold(GREY), exact
    zoo["png RGB of 16 bits"] = png(DEEP, 2, 16), PIXELS, exact
    deep_alpha = ALPHA.astype(np.uint16) * 257
    zoo["png RGBA of 16 bits"] = png(np.dstack([DEEP, deep_alpha]), 6, 16), ON_WHITE, exact
    grey_alpha = np.dstack([DEEP[..., 0], deep_alpha])
    zoo["png grey and alpha of 16 bits"] = png(grey_alpha, 4, 16), threefold(grey_on_white), exact
    for order, word in (("<", "little"), (">", "big")):
        values = DEEP[..., 0].astype(order + "u2")
        zoo[f"tiff of 16 bits {word} endian"] = grey_tiff(values, {}), threefold(GREY), exact
    inverted = grey_tiff(DEEP[..., 0], {262: (3, 0)})
    zoo["tiff of 16 bits, white is 0"] = inverted, threefold(255 - GREY), exact
    zoo["jp2 of 16 bits"] = save(Image.fromarray(DEEP[..., 0]), "JPEG2000"), threefold(GREY), exact
    zoo["pgm of 16 bits"] = b"P5 96 72 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), threefold(GREY), exact
    zoo["pgm of 10 bits"] = b"P5 96 72 1023\n" + (DEEP[..., 0] >> 6).astype(">u2").tobytes(), threefold(GREY), exact
    zoo["ppm of 16 bits"] = b"P6 96 72 65535\n" + DEEP.astype(">u2").tobytes(), PIXELS, exact
    zoo["ppm"] = save(PICTURE, "PPM"), PIXELS, exact
    zoo["jp2"] = save(PICTURE, "JPEG2000"), PIXELS, exact
    zoo["bmp"] = save(PICTURE, "BMP"), PIXELS, exact
    zoo["bmp palette"] = save(gif, "BMP"), palette[few], exact
    bits = Image.fromarray(GREY).convert("1")
    for form in ("BMP", "PNG", "TIFF", "PPM"):
        zoo[f"{form.lower()} of 1 bit"] = save(bits, form), raw_of(bits), exact
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        zoo[f"tiff {compression}"] = save(PICTURE, "TIFF", compression=compression), PIXELS, exact
    zoo["webp"] = save(PICTURE, "WEBP", quality=95), PIXELS, rough
    zoo["avif"] = save(PICTURE, "AVIF", quality=95), PIXELS, lossy
    return zoo


def refused():
    """name -> (file, how the reason begins)."""
    jpeg, whole = save(PICTURE, "JPEG", quality=95), png(PIXELS, 2)
    damaged, unsupported = "truncated or damaged", "unsupported pixels"
    zoo = {}
    for form in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000", "BMP", "PPM"):
        data = save(PICTURE, form)
        zoo[f"{form.lower()} cut off"] = data[: 2 * len(data) // 3], damaged
    data = whole.index(b"IDAT")
    zoo["png checksum of pixels"] = whole[:-16] + bytes([whole[-16] ^ 1]) + whole[-15:], damaged
    zoo["png checksum of header"] = whole[:29] + bytes([whole[29] ^ 1]) + whole[30:], damaged
    zoo["png pixels"] = whole[: data + 40] + bytes([whole[data + 40] ^ 64]) + whole[data + 41 :], damaged
    zoo["png without end"] = whole[:-12], damaged
    huffman = jpeg.index(b"\xff\xc4") + 5
    zoo["jpeg tables"] = jpeg[:huffman] + b"\xff" * 16 + jpeg[huffman + 16 :], damaged
    zoo["tiff of 32-bit integers"] = save(Image.fromarray(GREY.astype(np.int32)), "TIFF"), unsupported
    zoo["tiff of floats"] = save(Image.fromarray(GREY.astype(np.float32)), "TIFF"), unsupported
    signed = grey_tiff(DEEP[..., 0], {339: (3, 2)})
    zoo["tiff of signed integers"] = signed, unsupported
    zoo["tiff of 16 bits big endian, white is 0"] = grey_tiff(DEEP[..., 0].astype(">u2"), {262: (3, 0)}), damaged
    zoo["tiff Lab"] = save(Image.merge("LAB", PICTURE.split()), "TIFF"), unsupported
    zoo["pfm"] = b"Pf\n96 72\n-1.0\n" + GREY.astype("<f4").tobytes(), unsupported
    deep_key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    zoo["png of 16 bits, one transparent"] = png(DEEP, 2, 16, before=deep_key), unsupported
    deep_key = chunk(b"tRNS", struct.pack(">H", 1))
    zoo["png grey of 16 bits, one transparent"] = png(DEEP[..., 0], 0, 16, before=deep_key), unsupported
    zoo["png large"] = save(Image.new("L", (2000, 2000)), "PNG"), "too many pixels: 2000 x 2000"
    for name, data in {
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PDF": b"%PDF-1.7\n",
        "PSD": b"8BPS\0\1" + bytes(40),
        "ICO": save(PICTURE, "ICO"),
        "JPEG XL": b"\xff\x0a" + bytes(30),
        "MP4": b"\0\0\0\x18ftypisom" + bytes(30),
    }.items():
        zoo[name.lower()] = data, f"{name} files are not read"
    return zoo


def decoded(files, background=(255, 255, 255)):
    """Both backends' pixels in 0..255 of files that are WIDTH x HEIGHT or turned: of each a window at both ends."""
    spec = PreprocessSpec(image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1), eval_crop=1.0, background=background)
    sizes = np.array([(image.width, image.height) for image in files for _ in range(2)])
    params = draw_parameters(spec, 0, 0, np.arange(len(sizes)), *sizes.T, train=False)
    params["shape"][:] = SIDE
    params["anchor"][0::2], params["anchor"][1::2] = 0, sizes[1::2] - SIDE
    encoded = [image.data for image in files for _ in range(2)]
    found = []
    for backend in (ImagePipeline, ReferencePipeline):
        with closing(backend(spec, len(encoded))) as pipeline:
            images, ok = pipeline.decode(encoded, params)
        assert ok.tolist() == [True] * len(encoded), backend
        found.append(images.numpy().transpose(0, 2, 3, 1).reshape(len(files), 2, SIDE, SIDE, 3) * 255)
    return found


def test_both_backends_find_the_same_upright_pixels_in_every_accepted_file():
    zoo = accepted()
    files = {}
    for name, (data, pixels, _) in zoo.items():
        try:
            files[name] = check_image(data, MOST_PIXELS)
        except Rejected as reason:
            pytest.fail(f"{name}: {reason}")
        if pixels is not None:
            assert (files[name].height, files[name].width) == pixels.shape[:2], name
    assert len(zoo) + len(refused()) >= 80
    wrong = []
    for name, dali, pillow in zip(zoo, *decoded([*files.values()]), strict=True):
        _, pixels, bar = zoo[name]
        if (off := np.abs(dali - pillow).max()) > 1.01:
            wrong.append(f"{name}: DALI and Pillow differ by {off:.1f} of 255")
        if pixels is None:
            continue
        right = np.stack([pixels[:SIDE, :SIDE], pixels[-SIDE:, -SIDE:]])
        if (off := np.abs(pillow - right).mean()) > bar or (bar < 2 and np.abs(pillow - right).max() > bar):
            wrong.append(f"{name}: {off:.1f} of 255 from what was drawn")
        shown = np.asarray(decode_rgb(files[name].data)).astype(float)
        assert np.array_equal(shown[:SIDE, :SIDE], pillow[0].round()), f"{name}: thumbnails"
    assert not wrong, "\n".join(wrong)


def test_common_photos_are_left_to_dali_and_odd_ones_are_not():
    """On a GPU nvJPEG decodes the former; of the latter it is not known what it makes."""
    found = {name: plain(data) for name, (data, _, _) in accepted().items()}
    for name in ("4:4:4", "4:2:2", "4:2:0", "progressive", "grey", "Adobe YCbCr", "XMP 3, EXIF 8", "no JFIF"):
        assert found[f"jpeg {name}"], name
    assert all(found[f"jpeg EXIF {number} {order} endian"] for number in ORIENTATIONS for order in ("little", "big"))
    assert found["png RGB"] and found["png grey"] and found["png palette"] and found["png interlaced"]
    for name in (
        "CMYK",
        "of RGB",
        "of RGB by Adobe's marker",
        "XMP 6",
        "EXIF twice",
        "EXIF orientation 9",
        "EXIF of two values",
    ):
        assert not found[f"jpeg {name}"], name
    for name in ("RGBA", "RGB of 16 bits", "grey of 2 bits", "EXIF 1", "of two frames", "palette transparent"):
        assert not found[f"png {name}"], name


def test_every_other_file_is_refused_with_its_reason():
    for name, (data, reason) in refused().items():
        with pytest.raises(Rejected, match="^" + reason):
            check_image(data, MOST_PIXELS)
            pytest.fail(f"{name} was accepted")


def test_what_dali_refuses_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr("harness.data.decode_dali.plain", lambda data: True)
    files = [check_image(save(PICTURE, form), MOST_PIXELS) for form in ("PNG", "AVIF", "JPEG")]
    dali, pillow = decoded(files)
    assert np.abs(dali - pillow).max() <= 1.01


def test_the_background_is_what_the_specification_says():
    cut = np.dstack([PIXELS, np.where(ALPHA > 127, 255, 0).astype(np.uint8)])
    files = [check_image(data, MOST_PIXELS) for data in (png(cut, 6), png(PIXELS, 2))]
    for found in decoded(files, background=(10, 200, 30)):
        below = np.where(ALPHA[..., None] > 127, PIXELS, np.array([10, 200, 30]))
        assert np.abs(found[0, 0] - below[:SIDE, :SIDE]).max() <= 1
        assert np.abs(found[1, 0] - PIXELS[:SIDE, :SIDE]).max() <= 1, "a picture without alpha has no background"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_what_survives_random_damage_decodes_alike(form):
    """Whatever of 150 damaged files ingest accepts."""
    rng = np.random.default_rng(7)
    whole = save(PICTURE, form)
    files = []
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(2, len(whole), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            image = check_image(bytes(data), MOST_PIXELS)
        except Rejected:
            continue
        if min(image.width, image.height) >= SIDE:
            files.append(image)
    assert len(files) > (20 if form == "JPEG" else -1)
    if files:
        dali, pillow = decoded(files)
        assert np.abs(dali - pillow).max() <= 1.01


def test_a_large_jpeg_is_kept_at_half_its_size():
    large = Image.fromarray(PIXELS).resize((960, 720))
    data = save(large, "JPEG", quality=95, exif=b"Exif\0\0" + exif(6))
    whole, half = check_image(data, 960 * 720), check_image(data, 960 * 720 - 1)
    assert (whole.halved, whole.data, whole.width, whole.height) == (False, data, 720, 960)
    assert (half.halved, half.width, half.height) == (True, 360, 480)
    right = np.asarray(decode_rgb(data).resize((360, 480), Image.Resampling.BOX)).astype(float)
    assert np.abs(np.asarray(decode_rgb(half.data)) - right).mean() < 2
    with pytest.raises(Rejected, match="too many pixels: 960 x 720"):
        check_image(data, 960 * 720 // 4 - 1)

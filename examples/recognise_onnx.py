"""Recognise images with an exported model; needs onnxruntime, numpy and pillow.

python examples/recognise_onnx.py model.onnx IMAGE...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
size, grey = facts["image_size"], facts["channels"] == 1
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if grey else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(square, np.uint8).reshape(1, size, size, -1)
    class_scores, similarities = session.run(["class_scores", "similarities"], {"images": pixels})
    best = int(class_scores[0].argmax())
    score = float(class_scores[0, best])
    label = facts["class_names"][best] if score >= facts["threshold"] else "unknown"
    nearest = facts["gallery_ids"][int(similarities[0].argmax())]
    print(f"{path}: {label} (score {score:.3f}, threshold {facts['threshold']:.3f}, nearest training image {nearest})")

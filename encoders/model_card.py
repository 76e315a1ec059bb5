"""The README.md of an exported encoder: what it is, how to use it, how to check one's preprocessing, where it comes from.

(folder / "README.md").write_text(model_card(info))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encoders.export import ExportInfo

USE_OF_TIMM = """## Use

```python
import timm
encoder = timm.create_model("local-dir:PATH", pretrained=True)                  # features
classifier = timm.create_model("local-dir:PATH", pretrained=True, num_classes=5)  # with a fresh head
```

## Check that your preprocessing is right

```python
import timm, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
golden = load_file("PATH/golden.safetensors")  # pixels (u8), preprocessed, features
encoder = timm.create_model("local-dir:PATH", pretrained=True).eval()
print((encoder(golden["preprocessed"]) - golden["features"]).abs().max())
```
"""
USE_OF_ONNX = """## Use

```python
import onnxruntime
encoder = onnxruntime.InferenceSession("PATH/encoder.onnx")
features = encoder.run(None, {"preprocessed": images})[0]  # float32, images x channels x side x side
```

`model.safetensors` holds the same tensors by name, for further training.

## Check that your preprocessing is right

```python
import onnxruntime
from safetensors.numpy import load_file
golden = load_file("PATH/golden.safetensors")  # pixels (u8), preprocessed, features
encoder = onnxruntime.InferenceSession("PATH/encoder.onnx")
features = encoder.run(None, {"preprocessed": golden["preprocessed"]})[0]
print(abs(features - golden["features"]).max() / abs(golden["features"]).max())
```
"""


def model_card(info: ExportInfo) -> str:
    """The text of `README.md`."""
    steps = "\n".join(f"{i}. " + ", ".join(f"{key}: {value}" for key, value in step.items()) for i, step in enumerate(info.lineage, 1))
    data = "\n".join("* " + ", ".join(f"{key}: {value}" for key, value in entry.items()) for entry in info.data)
    channels = {1: "1 (grey)", 3: "3 (RGB)"}.get(info.in_chans, str(info.in_chans))
    part = f" up to its cut `{info.cut}`" if info.cut else ""
    part += f" with stages of {list(info.widths)} channels" if info.widths else ""
    use = USE_OF_TIMM if info.by_timm else USE_OF_ONNX
    same = f"0 with torch {info.torch} on the same kind of processor, within 1e-5 otherwise."
    exactly = same if info.by_timm else "Less than 1e-4 of the largest feature."
    return f"""---
license: other
library_name: {"timm" if info.by_timm else "onnx"}
tags: [medical-imaging, feature-extraction, allograft]
---
# {info.name}

An image encoder: `{info.architecture}`{part}, trained with `{info.method}`, without a classifier.
Channels: {channels}. Trained at {info.image_size} px.

Preprocessing: 8-bit pixels, antialiased bilinear resize to a square, divided by 255, then mean {list(info.mean)} and standard deviation
{list(info.std)} per channel.

{use}
{exactly} Put `golden["pixels"]` through your own
preprocessing and compare with `golden["preprocessed"]` before anything else.

## Lineage

{steps or "trained from random weights"}

Datasets whose labels were used: {", ".join(info.labelled_datasets) or "none"}.

## Data

{data or "none"}

Terms of the data: {info.licence}. Not a medical device: for research.

## Provenance

tensors sha256 `{info.sha256}`, file sha256 `{info.file_sha256}`, Allograft revision `{info.revision}`, torch {info.torch}, timm {info.timm}
"""

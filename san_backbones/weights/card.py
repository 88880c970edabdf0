"""Writes model cards: README.md of a model's repository on the Hugging Face Hub."""
from collections.abc import Mapping, Sequence
from typing import Any

from ..san import DEPTHS

AUTHORS = 'https://github.com/hszhao/SAN'
PAPER = 'https://arxiv.org/abs/2004.13621'
OUTSIDE_ARCH = ('position_ref_size', 'output_stride', 'out_indices')  # arguments of SANBackbone beside its arch


def front_matter(tags: Sequence[str], task: str, license: str | None, datasets: Sequence[str] = ()) -> str:
    """Returns the YAML block that the Hub reads."""
    lines = ['---'] + [f'license: {license}'] * bool(license)
    lines += ['library_name: timm', f'pipeline_tag: {task}', 'tags:']
    lines += [f'- {tag}' for tag in (task, 'timm', *tags)]
    if datasets:
        lines += ['datasets:', *(f'- {name}' for name in datasets)]
    return '\n'.join([*lines, '---'])


def backbone(architecture: str, options: Mapping[str, Any]) -> str:
    """Returns the arguments of SANBackbone that rebuild the model, as written in a config."""
    inside = {key: value for key, value in options.items() if key not in OUTSIDE_ARCH}
    outside = {key: value for key, value in options.items() if key in OUTSIDE_ARCH}
    arch: Any = architecture
    if inside:
        release, _, attention = architecture.partition('_')
        arch = {'attention': attention, 'depths': DEPTHS[release], **inside}
    return ''.join(f'        {key}={value!r},\n' for key, value in {'arch': arch, **outside}.items())


def usage(architecture: str, repository: str, num_classes: int, options: Mapping[str, Any]) -> str:
    """Describes how to load the model with timm, MMDetection and MMSegmentation."""
    stages = len(options.get('depths', DEPTHS['san15']))
    out_indices = tuple(range(min(1, stages - 1), stages))
    text = f"""## Usage

The model is registered by the Python package `san_backbones`.

### {'Classification' if num_classes else 'Features of the whole image'}

```python
import timm
import torch
from PIL import Image
import san_backbones  # registers the models with timm

model = timm.create_model('hf-hub:{repository}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
image = Image.open('picture.jpg').convert('RGB')
with torch.inference_mode():
    output = model(transform(image)[None])
{f"print(output.softmax(-1).topk({min(5, num_classes)}))" if num_classes else "print(output.shape)"}
```

### Feature maps

```python
model = timm.create_model('hf-hub:{repository}', pretrained=True, features_only=True, out_indices={out_indices})
for features in model(transform(image)[None]):
    print(features.shape)
```
"""
    if architecture.partition('_')[0] not in DEPTHS:
        return text
    if stages != len(DEPTHS['san15']):
        options = {**options, 'out_indices': out_indices}
    return text + f"""
### MMDetection, MMSegmentation

```python
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
{backbone(architecture, options)}\
        norm_cfg=dict(type='BN', requires_grad=True),
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:{repository}')))
```
"""


CITATION = """## Citation

```bibtex
@inproceedings{zhao2020san,
  title = {Exploring Self-attention for Image Recognition},
  author = {Zhao, Hengshuang and Jia, Jiaya and Koltun, Vladlen},
  booktitle = {CVPR},
  year = {2020}
}
```
"""


def table(models: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Returns a table of the paper's accuracies for all models of the manifest, this one in bold."""
    lines = ['| model | parameters | top-1 | top-5 |', '| --- | --- | --- | --- |']
    for name, entry in models.items():
        if 'paper_top1' not in entry:
            continue
        cells = [f"`{entry['architecture']}`", f"{entry['parameters'] / 1e6:.1f}M", entry['paper_top1'],
                 entry['paper_top5']]
        lines.append('| ' + ' | '.join(f'**{cell}**' if name == model else str(cell) for cell in cells) + ' |')
    return '\n'.join(lines)


def accuracy(entry: Mapping[str, Any], sha256: str) -> str:
    """Says what is known about the accuracy of the weights with this digest."""
    measured = entry.get('measured')
    if measured and measured['sha256'] == sha256:
        return (f"These weights, measured with `san-backbones weights verify` on the {measured['images']} "
                f"validation images: top-1 {measured['top1']:.2f}, top-5 {measured['top5']:.2f}.")
    return ('The figures are those of the paper: this copy has not been measured. `san-backbones weights verify` does '
            'it, on a folder with the validation images.')


def released(
        model: str,
        models: Mapping[str, Mapping[str, Any]],
        repository: str,
        source_sha256: str,
        sha256: str,
) -> str:
    """Returns the card of the authors' weights.

    Args:
        model: Name and tag, a key of `models`.
        models: The models of the manifest.
        repository: ORGANISATION/NAME, for the examples.
        source_sha256: Digest of the authors' file.
        sha256: Digest of model.safetensors.
    """
    entry = models[model]
    attention = entry['architecture'].rpartition('_')[2]
    head = front_matter(['self-attention', 'backbone'], 'image-classification', entry['license'], ['imagenet-1k'])
    return f"""{head}

# {model}

SAN with {attention} self-attention, trained on ImageNet-1k by the authors of
[Exploring Self-attention for Image Recognition]({PAPER}) (Zhao, Jia, Koltun, CVPR 2020).

## Where the weights come from

| | |
| --- | --- |
| authors | Hengshuang Zhao, Jiaya Jia, Vladlen Koltun |
| code | {AUTHORS} (MIT licence) |
| file | `{entry['source_file']}`, Google Drive id `{entry['drive_id']}` |
| its SHA-256 | `{source_sha256}` |
| `model.safetensors`, SHA-256 | `{sha256}` |

The tensors are the authors', renamed, in float32.

## Accuracy on ImageNet-1k

Resize to 256 (bilinear), centre crop 224.

{table(models, model)}

{accuracy(entry, sha256)}

{usage(entry['architecture'], repository, 1000, {})}
{CITATION}"""


def own(
        name: str,
        architecture: str,
        repository: str,
        source_sha256: str,
        num_classes: int,
        options: dict[str, Any],
        license: str | None,
        text: str | None,
        side: int | None,
) -> str:
    """Returns the card of weights that were trained with this package.

    Args:
        name: Title.
        architecture: Name of the model in timm.
        repository: ORGANISATION/NAME, for the examples.
        source_sha256: Digest of the checkpoint.
        num_classes: 0 for a backbone.
        options: Arguments that differ from the architecture's own.
        license: As the Hub spells it, or None.
        text: Markdown about the weights, or None.
        side: Of the pictures in training, for the steps of SANBackbone's coordinates; None if there are none.
    """
    task = 'image-classification' if num_classes else 'image-feature-extraction'
    settings = ', '.join(f'`{key}={value!r}`' for key, value in options.items())
    what = f'{num_classes} classes' if num_classes else 'no classifier'
    return f"""{front_matter(['self-attention', 'backbone'], task, license)}

# {name}

{text.strip() if text else 'How these weights were trained, and how good they are, is not stated.'}

## Structure

`{architecture}` of `san_backbones`{f' with {settings}' if settings else ''}, {what}. The architecture is that of
[Exploring Self-attention for Image Recognition]({PAPER}) (Zhao, Jia, Koltun, CVPR 2020).
SHA-256 of the checkpoint that was exported: `{source_sha256}`.

{usage(architecture, repository, num_classes, {**({'position_ref_size': side} if side else {}), **options})}
{CITATION}"""

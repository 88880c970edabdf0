"""The teacher, the student, and the loss between them."""
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

__all__ = ['LEVELS', 'Answer', 'Student', 'Teacher', 'load_teacher']

LEVELS = (8, 16, 32)  # strides of the feature maps that are compared
PIXELS = 2 ** 17  # that a thread of the CPU shows the teacher at once, so that its maps stay in the caches


class Answer(NamedTuple):
    """The outputs of a network: logits (N, C), pooled features (N, F), and feature maps by stride."""
    logits: Tensor | None
    pooled: Tensor | None
    maps: dict[int, Tensor]

    @classmethod
    def joined(cls, parts: Sequence['Answer']) -> 'Answer':
        """Joins the outputs for parts of a batch."""
        logits, pooled = (None if each[0] is None else torch.cat(each) for each in zip(*(part[:2] for part in parts)))
        return cls(logits, pooled, {stride: torch.cat([part.maps[stride] for part in parts])
                                    for stride in parts[0].maps})


def load_teacher(name: str, weights: str | os.PathLike[str] | None = None) -> Any:
    """Loads a teacher by name.

    Args:
        name: A timm model, or MODULE:FUNCTION, a function without arguments that returns a timm model or a callable.
        weights: A file with weights for the timm model; None takes timm's pretrained ones.

    Raises:
        ValueError: There is no such teacher.
        RuntimeError: Its weights are not available or do not fit.
    """
    module, _, function = name.partition(':')
    if function and module not in ('hf-hub', 'hf_hub', 'local-dir', 'timm'):
        if weights:
            raise ValueError(f'{name} brings its own weights: leave the file with weights out')
        try:
            make = getattr(importlib.import_module(module), function)
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f'there is no teacher {name!r} ({error}): expected a timm model, or MODULE:FUNCTION of a '
                             'module that Python finds (PYTHONPATH)') from error
        return make()
    if not module.count('/') and not function and not timm.is_model(name.partition('.')[0]):
        raise ValueError(f'there is no teacher {name!r}: expected a timm model, or MODULE:FUNCTION')
    if weights:
        return timm.create_model(name, checkpoint_path=os.fspath(weights))
    return timm.create_model(name, pretrained=True)


def _level_indices(model: Any, who: str, wanted: Sequence[int]) -> dict[int, int]:
    """Returns the index in forward_intermediates for each stride; the last one of that stride."""
    info = getattr(model, 'feature_info', None)
    if not callable(getattr(model, 'forward_intermediates', None)) or info is None:
        raise ValueError(f'the {who} {type(model).__name__} has no feature maps: timm gives it no '
                         'forward_intermediates and feature_info; ask for logits only (levels=())')
    reductions = info.reduction() if callable(getattr(info, 'reduction', None)) else [i['reduction'] for i in info]
    found = {stride: index for index, stride in enumerate(reductions)}
    missing = [stride for stride in wanted if stride not in found]
    if missing:
        raise ValueError(f'the {who} {type(model).__name__} has no feature map at stride '
                         f'{", ".join(map(str, missing))}, only at {", ".join(map(str, found))}: '
                         f'ask for levels that it has')
    return {stride: found[stride] for stride in wanted}


def _answer(model: Any, levels: dict[int, int], x: Tensor, pooled: bool, logits: bool = True) -> Answer:
    if levels:
        indices = sorted(levels.values())
        last, maps = model.forward_intermediates(x, indices=indices)
        by_index = dict(zip(indices, maps))
        found = {stride: by_index[index] for stride, index in levels.items()}
    else:
        last, found = model.forward_features(x) if hasattr(model, 'forward_features') else None, {}
    if last is None:
        return Answer(model(x), None, {})
    features = model.forward_head(last, pre_logits=True) if pooled else None
    return Answer(model.forward_head(last) if logits else None, features, found)


class Teacher(nn.Module):
    """A frozen network whose outputs the student learns.

    Args:
        model: A timm model, or a callable that takes normalised images (N, 3, size, size) and returns logits (N, C), or
            a pair of logits or None and a list of feature maps (N, C', H, W). Their sizes give their strides.
        levels: Strides of the feature maps to compare.
        mean: Mean of pixels in [0, 1] for the normalisation; None takes the timm model's, else ImageNet's.
        std: Their standard deviation.

    Raises:
        ValueError: The model has no feature map at one of the levels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, levels: Sequence[int] = LEVELS, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None):
        super().__init__()
        self.model: Any = model
        self.levels: tuple[int, ...] = tuple(levels)
        self.is_timm: bool = isinstance(model, nn.Module) and hasattr(model, 'forward_head')
        self.indices: dict[int, int] = _level_indices(
            model, 'teacher', self.levels) if self.is_timm and self.levels else {}
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        for name, value, default in (('mean', mean, IMAGENET_DEFAULT_MEAN), ('std', std, IMAGENET_DEFAULT_STD)):
            values = torch.tensor(value or cfg.get(name) or default)
            self.register_buffer(name, 255 * values.view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).to(memory_format=torch.channels_last).eval()
        classifier = model.get_classifier() if self.is_timm else None
        self.classifier: Any = classifier if isinstance(classifier, nn.Linear) else None

    def train(self, mode: bool = True) -> 'Teacher':
        """Keeps the teacher in eval mode."""
        return super().train(False)

    def ends_in_classifier(self, answer: Answer) -> bool:
        """Whether the logits are a linear map of the pooled features."""
        if self.classifier is None or answer.pooled is None or answer.logits is None:
            return False
        found = F.linear(answer.pooled, self.classifier.weight, self.classifier.bias)
        return found.shape == answer.logits.shape and torch.allclose(found, answer.logits, atol=.05, rtol=.05)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Answer:
        """Images (N, 3, size, size), uint8, to an `Answer` in float32."""
        if images.device.type == 'cpu':
            count = max(1, PIXELS * torch.get_num_threads() // images[0, 0].numel())
            if count < len(images):
                return Answer.joined([self(part) for part in images.split(count)])
        x = (images - self.mean) / self.std
        if self.is_timm:
            answer = _answer(self.model, self.indices, x, self.classifier is not None)
        else:
            result = self.model(x)
            logits, maps = result if isinstance(result, (tuple, list)) else (result, [])
            by_stride = {round(x.shape[-1] / each.shape[-1]): each for each in maps}
            missing = [stride for stride in self.levels if stride not in by_stride]
            if missing:
                raise ValueError(f'the teacher gave no feature map at stride {", ".join(map(str, missing))}, only at '
                                 f'{", ".join(map(str, by_stride)) or "none"}: ask for levels that it has')
            answer = Answer(logits, None, {stride: by_stride[stride] for stride in self.levels})
        logits, pooled = (None if x is None else x.float() for x in answer[:2])
        return Answer(logits, pooled, {stride: each.float() for stride, each in answer.maps.items()})


class Standardised(nn.Module):
    """Standardises the teacher's channels by statistics of some pictures, so that for every teacher the squared error
    of an untrained student is 1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer('mean', torch.zeros(channels))
        self.register_buffer('scale', torch.ones(channels))

    def set(self, count: Tensor, total: Tensor, squares: Tensor) -> None:
        """Sets mean and scale from the count, the sum and the sum of squares of each channel's values, (C,) each."""
        mean = total / count
        std = ((squares - count * mean.square()) / (count - 1)).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=1e-3 * float(std.max()) + 1e-12))  # does not amplify near-constant channels

    def forward(self, x: Tensor) -> Tensor:
        """Standardises feature maps (N, C, H, W) or pooled features (N, C)."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        return (x - self.mean.view(shape)) * self.scale.view(shape)


class Student(nn.Module):
    """The network that learns, with projections that are used in training only.

    If the teacher ends in a linear classifier, the student reuses it, frozen, and learns the features before it through
    a linear map. So it also knows classes that no picture shows (Chen et al., Knowledge Distillation with the Reused
    Teacher Classifier, CVPR 2022). `export` multiplies the two into the student's own classifier.

    Args:
        model: A timm model (SAN or another) with as many classes as the teacher.
        teacher: The teacher.
        example: Its answer to some pictures.
        reuse: Reuse the teacher's classifier.

    Raises:
        ValueError: The model has no feature map at one of the teacher's levels.
    """

    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, model: Any, teacher: Teacher, example: Answer, reuse: bool = True):
        super().__init__()
        self.model: Any = model
        self.indices: dict[int, int] = _level_indices(model, 'student', teacher.levels) if teacher.levels else {}
        channels = {stride: model.feature_info[index]['num_chs'] for stride, index in self.indices.items()}
        self.projections: nn.ModuleDict = nn.ModuleDict({
            str(stride): nn.Conv2d(channels[stride], example.maps[stride].shape[1], 1) for stride in channels})
        self.targets: Any = nn.ModuleDict({
            str(stride): Standardised(example.maps[stride].shape[1]) for stride in channels})
        self.embed: nn.Linear | None = None
        self.centred: Any = None
        if reuse and teacher.ends_in_classifier(example):
            classifier = teacher.classifier
            model.get_classifier().requires_grad_(False)  # not used before `export`
            # pooled ReLU outputs have large means; standardised, the linear map learns from the first step
            self.centred = nn.BatchNorm1d(model.head_hidden_size, affine=False)
            self.embed = nn.Linear(model.head_hidden_size, classifier.in_features)
            nn.init.zeros_(self.embed.weight)
            nn.init.zeros_(self.embed.bias)
            self.targets['pooled'] = Standardised(classifier.in_features)
            self.register_buffer('classifier_weight', classifier.weight.detach().clone(), persistent=False)
            bias = classifier.bias
            self.register_buffer('classifier_bias', torch.zeros(classifier.out_features) if bias is None
                                 else bias.detach().clone(), persistent=False)

    def measure(self, answers: Iterable[Answer]) -> None:
        """Measures mean and scale of the teacher's features."""
        sums: dict[str, Any] = {}
        for answer in answers:
            for name in self.targets:
                features: Any = answer.pooled if name == 'pooled' else answer.maps[int(name)]
                rows = features.movedim(1, -1).flatten(0, -2).double()
                part = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
                sums[name] = sums.get(name, 0) + part
        for name, part in sums.items():
            self.targets[name].set(*part)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Normalised images (N, 3, H, W) to logits, and to pooled features and feature maps (by stride) for comparison
        with the teacher's standardised ones; None for missing outputs.
        """
        reuses = self.embed is not None
        answer = _answer(self.model, self.indices, x, reuses, not reuses)
        maps = {str(stride): self.projections[str(stride)](each) for stride, each in answer.maps.items()}
        if self.embed is None:
            return answer.logits, None, maps
        pooled = self.embed(self.centred(answer.pooled))  # standardised
        features = pooled / self.targets['pooled'].scale + self.targets['pooled'].mean
        return F.linear(features, self.classifier_weight, self.classifier_bias), pooled, maps

    def losses(self, x: Tensor, answer: Answer, temperature: float) -> dict[str, Tensor]:
        """Computes the parts of the loss, one scalar each.

        Args:
            x: Normalised images, (N, 3, H, W).
            answer: The teacher's answer to the same views.
            temperature: Divides the logits.

        Returns:
            'logits', the KL divergence times the squared temperature; 'pooled' and each stride, the mean squared error
            of standardised features, 1 without learning. Parts without outputs are left out.
        """
        logits, pooled, maps = self(x)
        found = {}
        if answer.logits is not None:
            found['logits'] = temperature ** 2 * F.kl_div(
                F.log_softmax(logits.float() / temperature, 1), F.log_softmax(answer.logits / temperature, 1),
                reduction='batchmean', log_target=True)
        if pooled is not None:
            found['pooled'] = F.mse_loss(pooled.float(), self.targets['pooled'](answer.pooled))
        for stride, mine in maps.items():
            theirs = self.targets[stride](answer.maps[int(stride)])
            if theirs.shape[-1] > mine.shape[-1]:
                theirs = F.adaptive_avg_pool2d(theirs, mine.shape[-2:])
            elif theirs.shape[-1] < mine.shape[-1]:
                theirs = F.interpolate(theirs, mine.shape[-2:], mode='bilinear')
            found[stride] = F.mse_loss(mine.float(), theirs)
        return found

    @property
    def _classifier_name(self) -> str:
        classifier = self.model.get_classifier()
        return next(name for name, module in self.model.named_modules() if module is classifier)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor], images: Iterable[Tensor]) -> None:
        """Starts from a model's weights, as `export` returns them. The map to pooled features is recovered from the
        classifier; the other projections are not.

        Args:
            weights: State dict of the model.
            images: Batches of normalised images (N, 3, size, size), for the statistics of the pooled features.

        Raises:
            RuntimeError: The weights are another model's.
        """
        self.model.load_state_dict(weights)
        if self.embed is None:
            return
        self.model.eval()
        pooled = torch.cat([self.model.forward_head(self.model.forward_features(x), pre_logits=True) for x in images])
        self.centred.running_mean.copy_(pooled.mean(0))
        self.centred.running_var.copy_(pooled.var(0))
        mean, scale, last = self._linear_maps()
        classifier = self.model.get_classifier()
        # approximately the smallest map whose product with the teacher's classifier is this classifier
        product = last @ last.T
        product += 1e-4 * product.diagonal().mean() * torch.eye(len(last)).to(last)
        inverse = last.T @ torch.linalg.inv(product)
        rest = classifier.bias.double() + classifier.weight.double() @ mean - self._teachers_bias()
        self.embed.weight.copy_(inverse @ (classifier.weight.double() / scale))
        self.embed.bias.copy_(inverse @ rest)

    def _linear_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean and reciprocal standard deviation of the student's pooled features, and the teacher's classifier
        on standardised features, in float64."""
        return (self.centred.running_mean.double(), (self.centred.running_var.double() + self.centred.eps).rsqrt(),
                self.classifier_weight.double() / self.targets['pooled'].scale.double())

    def _teachers_bias(self) -> Tensor:
        """Returns the logits for standardised features of 0."""
        return self.classifier_bias.double() + self.classifier_weight.double() @ self.targets['pooled'].mean.double()

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """Returns the model's state dict; its classifier is the product of the learned map and the teacher's."""
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        if self.embed is not None:
            prefix = self._classifier_name
            mean, scale, last = self._linear_maps()
            weight = last @ (self.embed.weight.double() * scale)
            state[f'{prefix}.weight'] = weight.float()
            state[f'{prefix}.bias'] = (last @ self.embed.bias.double() - weight @ mean + self._teachers_bias()).float()
        return state

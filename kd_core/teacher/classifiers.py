"""Classifiers and how they read: models of transformers for texts and images, made new or loaded, with their processors.

A processor is a tokenizer for texts and an image processor for images. A classifier's columns are its classes, in the order of its
config's ``id2label``; that order is the teacher's, and every student has it too.
"""

import difflib
import io
import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from kd_core.errors import RecipeError, TeacherError
from kd_core.fingerprint import fingerprint
from kd_core.prompts.inputs import Inputs
from kd_core.recipe import ClassificationTask, ModelRef, NewClassifier, Recipe, TrainedClassifier, WordPieces
from kd_core.summaries import ClassifierIdentity
from kd_core.teacher.loaders import UNREADABLE, Place, new_classifier_of, one_line, quiet, read_classifier, read_config, read_processor
from kd_core.teacher.models import ModelFacts

__all__ = [
    "Classifier",
    "InputKind",
    "InputReader",
    "check_families",
    "check_family",
    "classes_of",
    "classifier_identity",
    "load_classifier",
    "load_processor",
    "new_classifier",
    "new_image_processor",
    "new_tokenizer",
    "save_classifier",
]

_LOG = logging.getLogger(__name__)

InputKind = Literal["text", "image"]

_CLASSIFIERS: Mapping[InputKind, Collection[str]] = {
    "text": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
"""Families that transformers has classifiers of."""
_LONGEST_TEXT = 512
"""Tokens that a text model reads where its config sets no limit; longer texts are cut, and how many is said."""
_HELD_BYTES = 512 << 20
"""Of inputs as models read them, in memory: preparing an image takes longer than a small model's step over it."""
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@dataclass(frozen=True)
class Classifier(ModelFacts):
    """A classifier ready to run.

    Attributes:
        model: with a classification head.
        processor: tokenizer or image processor.
        classes: names of its columns.
        reader: prepares inputs for it.
    """

    model: PreTrainedModel
    processor: Any
    classes: tuple[str, ...]
    reader: "InputReader"

    @property
    def num_columns(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def max_positions(self) -> None:
        """No matter of rows: a row is a hash and a class."""
        return None

    @property
    def token_map(self) -> None:
        """Nothing is trimmed."""
        return None

    def logits(self, hashes: Sequence[bytes]) -> Tensor:
        """Logits of inputs, shape (len(hashes), number of classes), float32."""
        batch = {name: value.to(self.device) for name, value in self.reader.batch(hashes).items()}
        found: Tensor = self.model(**batch).logits
        return found.float()


class InputReader:
    """Prepares inputs of one content-addressed file for a model, and holds them while there is room."""

    def __init__(self, processor: Any, config: PretrainedConfig, inputs: Inputs, kind: InputKind) -> None:
        self._processor, self._inputs, self._kind = processor, inputs, kind
        self._channels = int(getattr(config, "num_channels", 3))
        self.longest = _longest_text(processor, config) if kind == "text" else 0
        self._held: OrderedDict[bytes, Any] = OrderedDict()
        self._held_bytes = 0
        self.cut: set[bytes] = set()
        """Hashes of texts that were longer than the model reads."""
        self.cost = self.longest if kind == "text" else _image_cost(processor, config)
        """Tokens that an input counts as, at most, where a pass is cut to a budget of tokens."""

    def batch_size(self, budget_tokens: int) -> int:
        """Inputs of a pass within a budget of tokens, were each as long as the longest; at least one."""
        return max(1, budget_tokens // self.cost)

    def batch(self, hashes: Sequence[bytes]) -> dict[str, Tensor]:
        """Inputs of a model, on the CPU: pixel_values, or input_ids and attention_mask padded to the longest text."""
        found = [self._one(sha256) for sha256 in hashes]
        if self._kind == "image":
            return {"pixel_values": torch.stack(found)}
        return dict(self._processor.pad({"input_ids": found}, return_tensors="pt"))

    def _one(self, sha256: bytes) -> Any:
        if sha256 in self._held:
            return self._held[sha256]
        prepared: Any = self._image(self._inputs.read(sha256)) if self._kind == "image" else self._text(sha256)
        self._held[sha256], self._held_bytes = prepared, self._held_bytes + self._size(prepared)
        while self._held_bytes > _HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= self._size(self._held.popitem(last=False)[1])
        return prepared

    def _size(self, prepared: Any) -> int:
        return int(prepared.nbytes) if self._kind == "image" else 64 + 32 * len(prepared)

    def _image(self, data: bytes) -> Tensor:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("L" if self._channels == 1 else "RGB")
        return self._processor(pixels, return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]

    def _text(self, sha256: bytes) -> list[int]:
        ids: list[int] = self._processor(self._inputs.read(sha256).decode(), verbose=False)["input_ids"]
        if len(ids) <= self.longest:
            return ids
        if not self.cut:
            _LOG.warning("a text has %d tokens and the model reads %d: it is cut, and so are others as long", len(ids), self.longest)
        self.cut.add(sha256)
        return [*ids[: self.longest - 1], ids[-1]]  # the closing token stays


def _longest_text(tokenizer: Any, config: PretrainedConfig) -> int:
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min([_LONGEST_TEXT, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _image_cost(processor: Any, config: PretrainedConfig) -> int:
    height, width = _image_size(processor)
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) else max(1, min(16, height // 4))
    return (height // patch) * (width // patch) + 1


def _image_size(processor: Any) -> tuple[int, int]:
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    if "height" in size:
        return int(size["height"]), int(size["width"])
    edge = int(size.get("shortest_edge", 224))
    return edge, edge


# ---------------------------------------------------------------------------------------------- made new


def new_classifier(
    family: str, settings: Mapping[str, Any], processor: Any, classes: Sequence[str], kind: InputKind, *, seed: int, field: str
) -> PreTrainedModel:
    """A classifier with random weights in float32.

    Args:
        family: model type in transformers.
        settings: of its config, by their names there.
        processor: what its inputs are prepared by; a new text model has its tokens.
        classes: names of its columns.
        kind: what it reads.
        seed: of the weights.
        field: where the recipe speaks of it, for messages: 'teacher' or 'student'.

    Raises:
        RecipeError: no such family, a setting that it does not have, or one out of range.
    """
    check_family(family, settings, kind, field=field)
    own = {"num_labels": len(classes), "id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if kind == "text":
        own |= {"vocab_size": len(processor), "pad_token_id": processor.pad_token_id}
    torch.manual_seed(seed)
    try:
        return new_classifier_of(AutoConfig.for_model(family, **{**settings, **own}), images=kind == "image")
    except (TeacherError, *UNREADABLE) as error:
        raise RecipeError(f"{field}: no classifier of {kind}s can be made of a {family} with this config: {one_line(error)}") from error


def check_family(family: str, settings: Mapping[str, Any], kind: InputKind, *, field: str) -> None:
    """Check that transformers has classifiers of a family, with all these settings: it would take any name of a setting, and use none.

    Args:
        family: model type in transformers.
        settings: of its config, by their names there.
        kind: what the classifier shall read.
        field: where the recipe speaks of it, for messages: 'teacher' or 'student'.

    Raises:
        RecipeError: it has none, or no such setting, or one is of another type.
    """
    known = _CLASSIFIERS[kind]
    if family not in known:
        raise RecipeError(f"{field}.family: transformers has no classifier of {kind}s of the family {family!r}{_meant(family, known)}")
    try:
        names = set(AutoConfig.for_model(family).to_dict())
        AutoConfig.for_model(family, **settings)
    except UNREADABLE as error:
        raise RecipeError(f"{field}.config: {one_line(error)}") from error
    if unknown := sorted(set(settings) - names):
        raise RecipeError(f"{field}.config: a {family} has no {', '.join(unknown)}{_meant(unknown[0], names)}")


def check_families(recipe: Recipe) -> None:
    """Check the families of a recipe's new classifiers, before the first is trained.

    Raises:
        RecipeError: as ``check_family``.
    """
    assert isinstance(recipe.task, ClassificationTask), "other recipes have no classifiers"
    teacher, student = recipe.teacher, recipe.student
    if isinstance(teacher, TrainedClassifier) and teacher.family is not None:
        check_family(teacher.family, teacher.config, recipe.task.input, field="teacher")
    if isinstance(student, NewClassifier):
        check_family(student.family, student.config, recipe.task.input, field="student")


def _meant(name: str, known: Collection[str]) -> str:
    """Which known name a wrong one is like; where none is, some of them."""
    close = difflib.get_close_matches(name, known, n=1)
    shown = sorted(known)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(shown[:12])}{' ...' if len(shown) > 12 else ''}"


def new_image_processor(settings: Mapping[str, Any], *, first: bytes | None = None, like: Any = None) -> Any:
    """A processor for a new model: resizes to the model's image_size and maps brightness to -1 ... 1.

    Args:
        settings: of the model's config; of a family that has no image_size, the size is another's.
        first: an image whose size is taken then.
        like: or a processor whose size is taken.
    """
    from PIL import Image
    from transformers import ViTImageProcessorPil

    size = settings.get("image_size")
    if size is not None:
        height, width = int(size), int(size)
    elif first is not None:
        with Image.open(io.BytesIO(first)) as image:
            width, height = image.size
    else:
        height, width = _image_size(like)
    channels = int(settings.get("num_channels", 3))
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=[0.5] * channels, image_std=[0.5] * channels)


def new_tokenizer(texts: Iterable[str], words: WordPieces, *, longest: int) -> Any:
    """A tokenizer of the commonest words of some texts, lower-cased; single characters spell all others.

    It is a function of the texts alone: the trainers of the tokenizers library give another vocabulary each time.

    Args:
        texts: what the words are counted in.
        words: how many.
        longest: tokens of a text, at most.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    lower, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*_SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)]
    common = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(word) > 1]
    pieces += common[: max(0, words.size - len(pieces))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **_SPECIAL)


# ---------------------------------------------------------------------------------------------- loaded and saved


def load_processor(source: ModelRef | Path, kind: InputKind) -> Any:
    """The tokenizer or image processor of a reference, or of a directory that this project wrote.

    Raises:
        TeacherError: it cannot be loaded.
    """
    return read_processor(_place(source), images=kind == "image")


def load_classifier(
    source: ModelRef | Path, kind: InputKind, *, device: torch.device, inputs: Inputs, classes: Sequence[str] | None = None, seed: int = 0
) -> Classifier:
    """A classifier in eval mode, without gradients.

    Args:
        source: a reference, or a directory that this project wrote.
        kind: what it reads.
        device: where it runs.
        inputs: where its inputs are found.
        classes: gives it a new head with these classes, unless it has them already; None keeps its own.
        seed: of a new head.

    Raises:
        TeacherError: it cannot be loaded, or its classes have no names.
    """
    place = _place(source)
    config = read_config(place)
    own = classes_of(config)
    new_head = classes is not None and tuple(classes) != own
    if new_head and classes is not None:
        config.num_labels = len(classes)
        config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
        torch.manual_seed(seed)
    dtype = source.dtype if isinstance(source, ModelRef) else "float32"
    model = read_classifier(place, images=kind == "image", config=config, dtype=getattr(torch, dtype), ignore_mismatched_sizes=new_head)
    processor = read_processor(place, images=kind == "image")
    model = model.to(device).eval().requires_grad_(False)
    return Classifier(model, processor, tuple(classes) if classes is not None else own, InputReader(processor, config, inputs, kind))


def _place(source: ModelRef | Path) -> Place:
    return Place.directory(source, trust_remote_code=False) if isinstance(source, Path) else Place.of(source)


def classes_of(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of a classifier's columns, in their order."""
    names: Mapping[int, str] = config.id2label or {}
    return tuple(str(names[i]) for i in sorted(names))


def save_classifier(classifier: Classifier, directory: Path) -> None:
    """Write model/ below a directory: weights and processor in the Hugging Face layout."""
    with quiet(str(directory)):
        classifier.model.save_pretrained(directory / "model")
        classifier.processor.save_pretrained(directory / "model")


def classifier_identity(classifier: Classifier, weights: Mapping[str, Any]) -> ClassifierIdentity:
    """Content identity of a classifier: weights, processor, classes, dtype."""
    processor = classifier.processor
    backend = getattr(processor, "backend_tokenizer", None)
    content = processor.to_dict() if backend is None else {"tokenizer": backend.to_str(), "longest": classifier.reader.longest}
    if not classifier.classes:
        raise TeacherError("a classifier needs classes with names, and this model's config has none in id2label")
    return ClassifierIdentity(
        engine="classifier",
        weights=weights,
        processor=fingerprint({name: repr(value) for name, value in content.items()}),
        classes=classifier.classes,
        dtype=str(classifier.model.dtype).removeprefix("torch."),
    )

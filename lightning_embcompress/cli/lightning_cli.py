"""The LightningCLI behind ``embcompress``: its subcommands, ``run``, and the link from vocabulary to model."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from traceback import walk_tb
from typing import Any

import torch
from lightning import __version__
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

# jsonargparse resolves `class_path: LSTMLanguageModel` among the classes that are imported.
import lightning_embcompress.callbacks
import lightning_embcompress.data
import lightning_embcompress.modules  # noqa: F401
from lightning_embcompress.data.module import TextDataModule
from lightning_embcompress.integrations.checkpoint import keep_structure
from lightning_embcompress.integrations.checkpoint_io import check_checkpoint_file
from lightning_embcompress.modules.huggingface_models import pretrained_vocab_size

# The CLI's own default draws a random seed, and two runs of one recipe would differ without a word.
DEFAULT_SEED = 1

# The first line that LightningCLI writes into every saved configuration, up to the version.
_GENERATED = "# lightning.pytorch=="

_VOCAB_SIZE_KEY = "model.init_args.vocab_size"


class RecipeTrainer(Trainer):
    """A Trainer that also knows how to run a whole recipe."""

    def run(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Fit the model of a recipe, then test its final weights.

        The test sees the model as training left it, not the best checkpoint: what a recipe reports is what it made.

        Args:
            model: The model to fit and test.
            datamodule: Its data; None for a model that has dataloaders of its own.
            ckpt_path: Checkpoint from which training resumes. The test that follows does not load it.
            weights_only: Set to False to resume from a checkpoint that holds more than tensors and plain Python values
                (it then can run code: only from a source you trust). Needs lightning>=2.6.
        """
        # Passed on only where given: `fit` has this parameter since lightning 2.6.
        options = {} if weights_only is None else {"weights_only": weights_only}
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **options)
        if self.interrupted:
            return
        missing = self._missing_for_test(model, datamodule)
        if missing:
            rank_zero_info(f"Skipping the test: {missing}.")
            return
        self.test(model, datamodule=datamodule)

    @staticmethod
    def _missing_for_test(model: LightningModule, datamodule: LightningDataModule | None) -> str:
        from_data = datamodule is not None and is_overridden("test_dataloader", datamodule, LightningDataModule)
        if not from_data and not is_overridden("test_dataloader", model, LightningModule):
            return "there is no test data"
        # The data modules of this package have the hook, and raise in it where the recipe names no test files.
        if isinstance(datamodule, TextDataModule) and datamodule.source("test") is None:
            return "there is no test data"
        if not is_overridden("test_step", model, LightningModule):
            return f"{type(model).__name__} has no `test_step`"
        return ""


class SaveConfig(SaveConfigCallback):
    """Writes the merged configuration beside the logs, and never stops a run because a file is there.

    The file of an earlier run is replaced, by another training only. A ``config.yaml`` that a person wrote is left
    alone: without a logger the folder can be the current one.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.already_saved:
            # Every process must ask: reading `log_dir` broadcasts, which `save_config` on rank zero may not do.
            self._log_dir = trainer.log_dir
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._log_dir is None:
            return
        path = os.path.join(self._log_dir, self.config_filename)
        files = get_filesystem(self._log_dir)  # a log folder may be remote
        if files.isfile(path):
            if stage != "fit":
                return
            if not files.read_text(path).startswith(_GENERATED):
                rank_zero_info(f"Keeping {path}, which no run wrote: the merged configuration is not saved.")
                return
        # Lightning's own call drops link targets: a vocab_size that the recipe gives would be lost.
        config = self.parser.dump(self.config, skip_none=False, skip_link_targets=False, format="yaml")
        files.makedirs(self._log_dir, exist_ok=True)
        files.write_text(path, config if config.startswith(_GENERATED) else f"{_GENERATED}{__version__}\n{config}")


class EmbcompressCLI(LightningCLI):
    """LightningCLI with the subcommand ``run`` (fit, then test of the final weights), for any module and data module.

    A ``vocab_size`` that the data module knows goes to a model that takes one and is not given it; modules and data
    modules that know nothing of vocabularies are used as they are.

    Args:
        args: The command line after the program's name, a recipe given by ``--config``; None for that of this process.

    Example:
        >>> EmbcompressCLI.subcommands()["run"] == {"model", "datamodule"}
        True
    """

    def __init__(self, args: list[str] | None = None) -> None:
        """Parse the command line and run its subcommand."""
        self._link_error: Exception | None = None
        super().__init__(
            save_config_callback=SaveConfig,
            # `save_to_log_dir=False`: SaveConfig writes the file itself.
            save_config_kwargs={"save_to_log_dir": False},
            trainer_class=RecipeTrainer,
            seed_everything_default=DEFAULT_SEED,
            # The generated usage names sixty options, and a mistake would be lost below it.
            parser_kwargs={"prog": "embcompress"} | {name: {"usage": _usage(name)} for name in self.subcommands()},
            args=args,
            # An optimizer that the CLI builds would be built before the tables are compressed and miss their factors;
            # models take an OptimizerCallable instead.
            auto_configure_optimizers=False,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "run": {"model", "datamodule"}}

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # LightningCLI's own, but the model is not marked as required, so that `before_instantiate_classes` can say
        # what is missing in the words of a recipe.
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # jsonargparse ignores the link where the model has no such parameter. The source is the whole data module, so
        # that `vocab_size` (perhaps a long count) is read only for a model that wants it.
        parser.link_arguments("data", _VOCAB_SIZE_KEY, compute_fn=self._linking(), apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # LightningCLI warns about `args` beside a command line; here they are that command line, with the recipe's
        # name resolved.
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        # LightningCLI (since 2.5.2) would let the checkpoint's hyper-parameters override the recipe and the command
        # line, silently. Here these two say what the model is, and a checkpoint that does not fit is an error.
        return

    @override
    def before_instantiate_classes(self) -> None:
        self._take_tokenizer()
        if self._get(self.config, "model") is None:
            self._parser(self.subcommand).error(
                "no model: the recipe needs a key `model` with a `class_path` (the name of a model of this package, or "
                "package.module.Class), or the command line --model CLASS"
            )
        ckpt_path = self._get(self.config, "ckpt_path")
        # The others are words that Lightning resolves to a path.
        if ckpt_path is not None and ckpt_path not in ("best", "last", "hpc"):
            check_checkpoint_file(ckpt_path)

    def _take_tokenizer(self) -> None:
        """Give data that has no tokenizer that of the pretrained model, and the number of rows of its table."""
        data, model = (_init_args(self._get(self.config, name)) for name in ("data", "model"))
        pretrained = model.get("pretrained")
        if pretrained is None or "tokenizer" not in data or data["tokenizer"] is not None:
            return
        data["tokenizer"] = pretrained
        if "max_vocab_size" in data and data["max_vocab_size"] is None:
            data["max_vocab_size"] = pretrained_vocab_size(pretrained)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what happens inside a link in a message about links, and what a class says of its
            # arguments in one about types.
            if own := self._link_error or _own_error(error):
                raise own from None
            raise
        # Checkpoints of compressed models can then be tested by recipes without a callback too.
        keep_structure(self.model)

    def _linking(self) -> Callable[[LightningDataModule | None], Any]:
        def vocab_size_of(data: LightningDataModule | None) -> Any:  # the name is shown in --help
            model = self._get(self.config, "model")
            if "vocab_size" not in model.get("init_args", {}):
                return None  # this model has no such parameter
            try:
                vocab_size = _vocab_size(model.class_path, model.init_args.vocab_size, data)
            except Exception as error:
                self._link_error = error
                raise
            # Kept in both records of the configuration: the one saved beside the logs, and the one from which the
            # checkpoint's hyper-parameters come (Lightning before 2.6 does not add linked values to it).
            model.init_args.vocab_size = vocab_size
            if hasattr(self, "config_dump"):
                self.config_dump["model"].setdefault("init_args", {})["vocab_size"] = vocab_size
            return vocab_size

        return vocab_size_of


def _init_args(given: Any) -> Any:
    return {} if given is None else given.get("init_args") or {}


def leave_process_group() -> None:
    """Destroy the process group that a run of several processes has opened; after the last command of a process.

    Lightning leaves it open, and threads of gloo that are still there while the interpreter ends now and then abort it
    (SIGABRT, "terminate called without an active exception"): the run would be reported as failed after it went well.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _own_error(error: BaseException) -> BaseException | None:
    """Find the error of this package that others were raised for."""
    cause: BaseException | None = error
    while cause is not None:
        names = [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(cause.__traceback__)]
        is_ours = bool(names) and names[-1].startswith("lightning_embcompress.")
        if is_ours and isinstance(cause, ValueError | FileNotFoundError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _vocab_size(class_path: str, given: Any, data: LightningDataModule | None) -> Any:
    """Return the vocab_size that a model gets: what its recipe gives, else what the data knows, else its default."""
    default = _parameter_default(class_path, "vocab_size")
    known = getattr(data, "vocab_size", None)
    model = class_path.rsplit(".", 1)[-1]
    if given is not None and given != default:
        # Larger is usual (rounded up for speed), smaller means ids beyond the table.
        if isinstance(known, int) and isinstance(given, int) and given < known:
            raise ValueError(
                f"{_VOCAB_SIZE_KEY} of {model} is {given}, but {type(data).__name__} has {known} tokens; "
                f"give at least {known}, or leave the key out"
            )
        return given
    if known is not None:
        return known
    if given is None and default is inspect.Parameter.empty:
        source = "there is no data module" if data is None else f"{type(data).__name__} has no `vocab_size`"
        raise ValueError(f"{model} needs a vocab_size and {source}; set {_VOCAB_SIZE_KEY}")
    return given


def _usage(subcommand: str) -> str:
    recipe = "RECIPE.yaml|NAME" if subcommand == "run" else "--config RECIPE.yaml|NAME"
    return f"embcompress {subcommand} {recipe} [options]"


def _parameter_default(class_path: str, name: str) -> Any:
    """Return the default of a parameter of a class or function, also of one that goes on to a base by ``**kwargs``."""
    module, _, attribute = class_path.rpartition(".")
    target = getattr(importlib.import_module(module), attribute)
    constructors = [target]
    if isinstance(target, type):
        constructors = [vars(base)["__init__"] for base in target.__mro__[:-1] if "__init__" in vars(base)]
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters
        if name in parameters:
            return parameters[name].default
    return inspect.Parameter.empty

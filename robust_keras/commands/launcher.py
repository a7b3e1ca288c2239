"""Starts a command: what TensorFlow reads when it is imported, flags, and errors as one line and an exit code.

Import this before anything that imports TensorFlow.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags

from robust_keras import shown_text
from robust_keras.commands import exit_codes

# Convolutions on AVX2 machines are 1.4 to 2 times faster with it; it is off by default there.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def launch(
    main: Callable[[flags.FlagValues], None],
    define_flags: Callable[[flags.FlagValues], None],
    description: str,
    *,
    plain: str | None = None,
) -> None:
    """Parses the command line, runs `main(values)`, and exits with 0, or with a line on stderr and one of `exit_codes`.

    Args:
        main: takes the `absl.flags.FlagValues`.
        define_flags: takes the `absl.flags.FlagValues` and defines the command's flags in it.
        description: what `--help` says before it lists the flags.
        plain: name of the flag whose value may stand alone.
    """
    values = flags.FlagValues()
    define_flags(values)
    if "--help" in sys.argv[1:]:
        print(f"{description.strip()}\n{values.get_help()}")
        return
    try:
        rest = values(sys.argv)[1:]
        if plain and len(rest) == 1:
            values[plain].value = rest.pop()
        if rest:
            raise flags.Error(f"Expected flags only. Received: {' '.join(rest)}")
    except flags.Error as error:
        _exit(exit_codes.USAGE, _one_line(error))

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, frame):
        for each, handler in previous.items():  # A second signal does not wait.
            signal.signal(each, handler)
        raise _Stopped(f"Stopped by {signal.Signals(number).name}; what was finished is kept")

    for number in previous:
        signal.signal(number, stop)  # While training something better does.
    try:
        _run(main, values)
    except _Stopped as error:
        _exit(exit_codes.TERMINATED, str(error))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Stopped(BaseException):  # No handler of errors takes it for one.
    pass


def _run(main: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> None:
    with _garbage_left_alone():
        from robust_keras.training import run_state, termination

    try:
        if "import" in values and values["import"].value:
            from robust_keras.commands import registration

            registration.import_modules(values["import"].value)
        with _trust(values):
            main(values)
    except run_state.NonFiniteLoss as error:
        _exit(exit_codes.NON_FINITE_LOSS, _one_line(error))
    except termination.Terminated as error:
        _exit(exit_codes.TERMINATED, _one_line(error))
    except Exception as error:
        told = None if os.environ.get("ROBUST_KERAS_TRACEBACK") else _told(error)
        if told is None:
            raise
        _exit(*told)


def _trust(values: flags.FlagValues) -> contextlib.AbstractContextManager:
    """Whether models that the command loads are trusted."""
    if "trust_model" not in values or not values.trust_model:
        return contextlib.nullcontext()
    from robust_keras.saved_models import safety

    return safety.trusting()


@contextlib.contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """In a process of this command alone, looks for garbage rarely, and not among what is imported inside.

    It would be looked for again and again, and once more at the end of the process: a second and a half of each.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    gc.disable()
    yield
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()
    atexit.register(gc.freeze)


def _told(error: Exception) -> tuple[int, str] | None:
    """The exit code of an error and what to say of it; None of one whose traceback has to be seen."""
    import tensorflow as tf

    from robust_keras import failures
    from robust_keras.data import sources

    path = failures.traceback_path(error)
    kept = f"; the traceback is in {path}" if path else ""
    if isinstance(error, sources.DataUnavailable) and not path:
        return exit_codes.USAGE, str(error)  # It may hold commands, one on a line.
    if isinstance(error, ValueError) and not path:
        return exit_codes.USAGE, _one_line(error)
    if isinstance(error, (OSError, tf.errors.OpError)):
        reason = next(iter(str(getattr(error, "message", error)).splitlines()), type(error).__name__)
        of_files = (OSError, tf.errors.PermissionDeniedError, tf.errors.UnimplementedError, tf.errors.NotFoundError)
        no_folder = isinstance(error, tf.errors.FailedPreconditionError) and "directory" in reason  # But a file.
        if no_folder or isinstance(error, (*of_files, tf.errors.ResourceExhaustedError)):
            return (
                exit_codes.FAILED,
                f"Expected files and memory as the command needs them. Received: {_one_line(reason)}{kept}",
            )
        if "TF_CONFIG" in os.environ:
            again = "start all of them again to go on"
            return exit_codes.FAILED, f"Expected all processes to answer. Received: {_one_line(reason)}; {again}{kept}"
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return (exit_codes.FAILED, f"{name}{_one_line(error)}{kept}") if path else None


def define_recipe(values: flags.FlagValues, what: str = "Recipe, such as gin/at.gin") -> None:
    """Defines the flags that say what a command runs; `what` is in its gin files."""
    flags.DEFINE_multi_string("gin_file", None, f"{what}; several are read in order.", flag_values=values)
    flags.mark_flag_as_required("gin_file", flag_values=values)
    define_bindings(values)


def define_bindings(values: flags.FlagValues) -> None:
    """Those of these flags that a command takes which knows its recipes itself."""
    flags.DEFINE_multi_string(
        "gin_param", [], "Binding, such as \"EPSILON = '4/255'\"; any number of times.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where data sets are, or are to be downloaded to.", flag_values=values)
    define_import(values)
    define_trust(values)


def define_trust(values: flags.FlagValues) -> None:
    """Defines the flag that lets a command load what it would refuse."""
    flags.DEFINE_bool(
        "trust_model",
        False,
        "Load models that do more than compute, or have links among their files: you have looked at them.",
        flag_values=values,
    )


def define_import(values: flags.FlagValues) -> None:
    """Defines the flag of modules that are imported before a command does anything."""
    flags.DEFINE_multi_string(
        "import", [], "Module with functions or layers of your own, imported first; any number.", flag_values=values
    )


def define_strategy(values: flags.FlagValues) -> None:
    """Defines the flags that say where a command computes."""
    flags.DEFINE_string(
        "strategy",
        None,
        "auto (the default), one, mirrored (all GPUs), tpu, multi_worker (as TF_CONFIG lists them), or jax (all that "
        "JAX drives).",
        flag_values=values,
    )
    flags.DEFINE_string("tpu", None, "Address of the TPU; the attached one by default.", flag_values=values)


def define_reading(values: flags.FlagValues) -> None:
    """Defines the flags that say how a saved classifier is read."""
    flags.DEFINE_list(
        "input_range", ["0", "1"], "The model's pixel values for black and white, low,high.", flag_values=values
    )
    flags.DEFINE_enum("input_layout", "NHWC", ["NHWC", "NCHW"], "How the model takes images.", flag_values=values)
    flags.DEFINE_enum("outputs", "logits", ["logits", "probabilities"], "What the model returns.", flag_values=values)
    flags.DEFINE_string("logits_output", None, "Name of the output, where the model has several.", flag_values=values)


def given_reading(values: flags.FlagValues) -> list[str]:
    """Names of these flags that the command line has."""
    return [name for name in ("input_range", "input_layout", "outputs", "logits_output") if values[name].present]


def reading(values: flags.FlagValues) -> dict[str, Any]:
    """What these flags say: keyword arguments of `saved_models.load.load_logits_fn`.

    Raises:
        ValueError: for an input range that is not two numbers.
    """
    from robust_keras import threats

    if len(values.input_range) != 2:
        raise ValueError(f"Expected --input_range=low,high. Received: {','.join(values.input_range)}")
    low, high = (threats.parse_fraction(value, "each end of --input_range") for value in values.input_range)
    return {
        "input_range": [low, high],
        "input_layout": values.input_layout,
        "outputs": values.outputs,
        "logits_output": values.logits_output,
    }


def _one_line(error: object) -> str:
    # gin adds to a message where in the configuration the call came from.
    lines = [line for line in str(error).splitlines() if not line.lstrip().startswith("In call to configurable")]
    return " ".join(" ".join(lines).split())


def _exit(code: int, said: str) -> NoReturn:
    # What a model says of itself may be in it, and would steer the terminal.
    shown = "\n".join(shown_text.printable(line, most=len(line)) for line in said.split("\n"))
    print(f"error: {shown}", file=sys.stderr, flush=True)
    sys.exit(code)

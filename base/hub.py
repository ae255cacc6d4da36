"""The Hugging Face hub, asked once.

Libraries ask the hub for each file of a model, and where it does not answer they try again for half
a minute each time. So the hub is asked whether it has the model, once and briefly, before a library
loads it; where it does not answer, the library looks in its local cache alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.addresses import ADDRESSES, address_of, where_from
from base.errors import UserError, first_line
from base.names import did_you_mean
from base.remote import silence

SECONDS = 10.0  # in which the hub must answer
NO_NETWORK = ("connect", "offline", "cached", "resolve", "timed out", "urlopen", "proxy", "network")
_SILENT: set[str] = set()  # hubs that did not answer this process
_REFUSING: set[str] = set()  # hubs that did not take its token


class HubSilent(UserError):
    """The hub does not answer, or does not take the token."""


@contextmanager
def from_hub(what: str, name: str | Path | None = None, remedy: str = "") -> Iterator[None]:
    """Around a library's call that may load the model `name` from the hub: whatever it raises
    becomes one UserError that starts with `what`.

    name: of the hub, or a local folder, for which nothing is asked; None where the library knows.
    remedy: what else a user can do without a network.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what matters is in the exception
    try:
        _set_offline(offline or not _reachable(what, name))
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise anything: OSError, RuntimeError, KeyError, …
        text = " ".join(str(error).split()) or type(error).__name__
        if constants.ENDPOINT in _REFUSING:
            raise UserError(f"{what}: not in the local cache, and {_refusal()}{remedy}") from None
        if any(word in text.lower() for word in NO_NETWORK):
            raise UserError(f"{what}: {_not_here(name)}{remedy}") from None
        raise UserError(f"{what}: {text[:300]}{_published(name)}") from None
    finally:
        _set_offline(offline)
        logging.disable(disabled)


def ask_hub(name: str, kind: str = "model") -> None:
    """Ask the hub once for a model or a dataset, unless HF_HUB_OFFLINE is set. HubSilent where it
    does not answer or take the token, UserError where it has none of that name."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return
    limit_silence()
    try:
        if constants.ENDPOINT in _SILENT:
            raise ConnectionError("no answer to an earlier question")
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        ask(name, timeout=SECONDS)
    except GatedRepoError:
        return  # the library says what to do
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"the hub has no {kind} {name}{_published(name)}; check the name, and log in with "
            "`hf auth login` where it is private"
        ) from None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) != 401:
            return  # it answers, but does not know this question
        _REFUSING.add(constants.ENDPOINT)
        raise HubSilent(_refusal()) from None
    except Exception as error:  # of the network: the client's versions have their own exceptions
        _SILENT.add(constants.ENDPOINT)
        reason = first_line(error)
        raise HubSilent(f"{constants.ENDPOINT} cannot be reached ({reason})") from None


def limit_silence() -> None:
    """Let huggingface_hub give up on a hub that has gone silent, for which its client waits without
    end (from 1.0)."""
    from huggingface_hub.utils import get_session

    get_session().timeout = silence()


def _reachable(what: str, name: str | Path | None) -> bool:
    """Whether the library may ask the hub. UserError where the hub has no such model."""
    if name is None or Path(name).exists():
        return True
    if str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or not str(name):
        hint = where_from(name)
        raise UserError(f"{what}: no such folder, and no name of the hub (USER/NAME){hint}")
    try:
        ask_hub(str(name))
    except HubSilent:
        return False
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return True


def _refusal() -> str:
    from huggingface_hub import constants

    return (
        f"{constants.ENDPOINT} refuses the token (401): log in again with `hf auth login`, or unset "
        "HF_TOKEN for what is public"
    )


def _set_offline(value: bool) -> None:
    import huggingface_hub

    if value == huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = value
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # before 1.0 a session keeps the mode
        huggingface_hub.utils.reset_sessions()


def _not_here(name: str | Path | None) -> str:
    """What is wrong, and what to do."""
    fetch = f"{_published(name)}; fetch it where there is a network"
    if name is not None and not _published(name):
        found = address_of(name)
        command = found.command if found else f"hf download {name} --local-dir PATH"
        command = command.replace("PATH", "FOLDER")
        fetch = f"; where there is a network, `{command}`, and name that folder"
    return f"not in the local cache, and the hub cannot be reached{fetch}"


def _published(name: str | Path | None) -> str:
    """`; did you mean …?` for what is nearly a published name."""
    if name is None or address_of(name):
        return ""
    return did_you_mean(Path(name).name, ADDRESSES, cutoff=0.8)

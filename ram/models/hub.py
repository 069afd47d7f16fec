"""Access to models of the hub: whether their weights can be reached, and what to do if not."""

from ram.errors import UserError


def how_to_log_in(hub_id: str) -> str:
    """Return the steps to get access to a gated model."""
    return (
        f"ask for access at https://huggingface.co/{hub_id}, then run `hf auth login` or set HF_TOKEN; or "
        "give a local copy (RAM_MODEL_ROOT)"
    )


def unreachable(hub_id: str) -> str | None:
    """Return why a model cannot be read now, None if it is in the cache or the hub lets this user read it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            return None
        HfApi().auth_check(hub_id)
    except GatedRepoError:
        return f"gated: {how_to_log_in(hub_id)}"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    except HfHubHTTPError as error:
        return _lines(error)[-1][:200]
    except Exception as error:  # the errors of whatever library makes the connection
        return f"no connection to the hub: {_lines(error)[0][:200]}"
    return None


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def check_gated(source: str, error: BaseException) -> None:
    """Raise UserError with the remedy if a model was refused because it is gated.

    Args:
        source: the hub id.
        error: what loading it raised; transformers wraps the hub's own error.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    words = ("gated repo", "is restricted", "awaiting a review")
    if any(type(c).__name__ == "GatedRepoError" or any(w in str(c) for w in words) for c in causes):
        raise UserError(f"{source} is gated: {how_to_log_in(source)}") from None

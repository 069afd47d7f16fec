"""The entry point `vllm.general_plugins`, which every process of vLLM calls."""


def register() -> None:
    """Make the architecture RAMPair known to vLLM; its module is imported only if it is used."""
    from vllm.model_executor.models.registry import ModelRegistry

    if "RAMPair" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("RAMPair", "ram.vllm.model:RAMPair")

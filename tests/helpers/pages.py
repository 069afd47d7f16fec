"""The commands of the documentation."""

import re


def commands(text: str) -> list[str]:
    """The commands in the bash blocks of a page that start one of our scripts, arrays filled in."""
    for name, keys in re.findall(r"^(\w+)=\((.*)\)$", text, flags=re.MULTILINE):
        text = text.replace(f'"${{{name}[@]}}"', keys)
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(bash bin/|python (?!- ))", line)]

"""PolicyBook: an optimizer's policies by their canonical JSON strings, which its groups and checkpoints hold."""

from .policy import Policy, from_json


class PolicyBook:
    """Keeps what a string cannot: callable schedules and fixed masks."""

    def __init__(self) -> None:
        self._by_json: dict[str, Policy] = {}

    def add(self, mask: Policy | str | None) -> str | None:
        """Enters a policy and returns its string; None stays None, and a string is checked.

        Raises:
            TypeError: ``mask`` is no policy.
            ValueError: a string that is none, or a second callable of the same name.
        """
        if mask is None:
            return None
        if isinstance(mask, str):
            self.get(mask)
            return mask
        if not isinstance(mask, Policy):
            raise TypeError(f"mask= must be a policy such as GradDrop(p=0.2), or None for plain AdamW; got {mask!r}")
        text = mask.to_json()
        if self._by_json.setdefault(text, mask) != mask:
            raise ValueError(
                f"two different callables p have one name, which a checkpoint could not tell apart: {text}; "
                "define them with def, by two names"
            )
        return text

    def get(self, text: str | None) -> Policy | None:
        """The policy of a string. Raises ValueError as ``policies.from_json`` does."""
        if text is None:
            return None
        if text not in self._by_json:
            self._by_json[text] = from_json(text)
        return self._by_json[text]

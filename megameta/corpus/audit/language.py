"""The language of a document, by py3langid (Lui & Baldwin 2012's langid with a newer model)."""

from typing import Any

#: Characters of the beginning that are looked at. Documents of several languages count as that of their beginning.
PREFIX = 1000
#: Below this confidence, and for texts without a letter, the language is undetermined.
CONFIDENCE = 0.5
UNDETERMINED = "und"


class LanguageFinder:
    """ISO 639 codes; ``names`` is all it can answer, sorted, so that a code has the same number everywhere."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier: Any = LanguageIdentifier.from_model_file(
            MODEL_FILE, norm_probs=True, min_confidence=CONFIDENCE
        )
        self.names = sorted({UNDETERMINED, *self._identifier.labels})

    def find(self, text: str) -> str:
        """The code of ``text``, the same on every call."""
        beginning = text[: 2 * PREFIX].lstrip()[:PREFIX]
        if not any(map(str.isalpha, beginning)):
            return UNDETERMINED
        return str(self._identifier.classify(beginning)[0])

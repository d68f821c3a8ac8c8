"""Errors that a user can mend."""


class RecipeError(ValueError):
    """Settings, data or files that cannot be used; the message says what was expected, what was found, what helps."""


class DataError(RecipeError):
    """Input data that cannot be used; the message says where."""

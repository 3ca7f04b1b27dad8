"""Which revision of the desired state is in force: the newest one that is valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reconciler import source
from reconciler.desired.load import DesiredError, load
from reconciler.inventory import Inventory
from reconciler.kinds.base import seconds
from reconciler.model import ConfigurationError, Problem
from reconciler.settings import Settings
from reconciler.source import SHORT, Mirror, SourceError


@dataclass(frozen=True)
class InForce:
    """What a pass works from: settings whose paths lead into a checkout, and what is wrong with the newest one.

    ``rejected`` is the revision that is ignored since it is invalid, with its ``problems``; ``unreachable`` says why
    the repository could not be asked.
    """

    settings: Settings
    revision: str
    rejected: str = ""
    problems: tuple[Problem, ...] = ()
    unreachable: str = ""


@dataclass
class Follower:
    """Follows a repository. ``settings`` are as a person wrote them."""

    settings: Settings
    mirror: Mirror
    desired: Path
    inventory: Path
    unreachable: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Follower:
        """One for these settings. Raises ConfigurationError where there is nothing to follow."""
        git = settings.git
        if git.url:
            origin, top = source.Origin(git.url, git.branch, git.tag or ""), Path()
            for name in ("desired", "inventory"):
                if getattr(settings, name).is_absolute():
                    hint = "a path within the repository, such as desired_state"
                    raise ConfigurationError(
                        [Problem(f"{name} has to lead into the repository of [git]", hint=hint)]
                    )
        else:
            origin, top = source.enclosing(settings.desired)
        is_relative = git.url is not None
        desired = _within(settings.desired, top, is_relative=is_relative)
        inventory = _within(settings.inventory, top, is_relative=is_relative)
        mirror = Mirror(settings.db.parent / "git", origin, seconds(git.timeout))
        return cls(settings, mirror, desired, inventory)

    def fetch(self) -> bool:
        """Ask the repository; whether another revision is wanted than before. Trouble is remembered, never raised."""
        before = self.mirror.fetched()
        try:
            newest = self.mirror.fetch()
        except SourceError as error:
            self.unreachable = str(error)
            return False
        self.unreachable = ""
        return newest != before

    def in_force(self) -> InForce:
        """The newest revision that is valid. Raises ConfigurationError where there is none at all."""
        newest, good = self.mirror.fetched(), self.mirror.good()
        if newest is None and good is None:
            hint = "the next try may succeed; nothing was touched"
            message = (
                f"{self.mirror.origin.url} was never fetched: {self.unreachable or 'it has no such revision'}"
            )
            raise ConfigurationError([Problem(message, hint=hint)])
        wrong: ConfigurationError | None = None
        if newest is not None and newest != good:
            wrong = self._wrong_with(newest)
            if wrong is None:
                self.mirror.keep(newest)
                good = newest
        if good is None:
            assert wrong is not None  # noqa: S101 - there is a newest one, and it is not good
            raise wrong
        found = InForce(self._settings_at(good), good[:SHORT], unreachable=self.unreachable)
        if wrong is None or newest is None:
            return found
        return replace(found, rejected=newest[:SHORT], problems=tuple(wrong.problems))

    def _wrong_with(self, revision: str) -> ConfigurationError | None:
        """What a person has to mend in a revision. Asked anew for every pass: a secret it refers to may have come."""
        at = self._settings_at(revision)
        try:
            load(at.desired, Inventory(at.inventory))
        except ConfigurationError as error:
            return _told_within(error, self._root(revision), revision)
        return None

    def _settings_at(self, revision: str) -> Settings:
        root = self._root(revision)
        paths = {"desired": root / self.desired, "inventory": root / self.inventory}
        return self.settings.model_copy(update=paths)

    def _root(self, revision: str) -> Path:
        try:
            return self.mirror.checkout(revision).directory
        except SourceError as error:
            raise ConfigurationError(
                [Problem(f"revision {revision[:SHORT]} cannot be read: {error}")]
            ) from error


def _within(path: Path, top: Path, *, is_relative: bool) -> Path:
    if is_relative:
        return path
    try:
        return path.resolve().relative_to(top.resolve())
    except ValueError:
        raise ConfigurationError(
            [Problem(f"{path} is not in the repository at {top}, which is pulled")]
        ) from None


def _told_within(error: ConfigurationError, root: Path, revision: str) -> ConfigurationError:
    """The same problems, at places as people know them: within the repository, at that revision."""

    def place(file: str) -> str:
        short = file.removeprefix(f"{root}/")
        return f"{revision[:SHORT]}:{short}" if short != file else file

    def told(problems: Sequence[Problem]) -> list[Problem]:
        return [
            replace(
                problem,
                message=problem.message.replace(f"{root}/", ""),
                mark=replace(problem.mark, file=place(problem.mark.file)) if problem.mark else None,
            )
            for problem in problems
        ]

    if isinstance(error, DesiredError):
        documents = {place(file): document for file, document in error.documents.items()}
        return DesiredError(told(error.problems), documents)
    return ConfigurationError(told(error.problems))

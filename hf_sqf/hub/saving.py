"""What compressed models do when they are saved or pushed, where hf_sqf is installed: they bring a card."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..runtime.sqf_model import MIXINS, Base

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)


class SavesWithCard(Base):
    """Mixin before a model's own class. Nothing but saving and pushing changes."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as any model of transformers, and write a model card unless a hand-written one stands there.

        With ``push_to_hub=True`` see :meth:`push_to_hub`, whose arguments may be given too.
        """
        from .card import write_card
        from .pushing import PUSH_OPTIONS

        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        # Of the ranks of torch.distributed, transformers (5.23, earlier ones differ) has only the first write.
        is_main_process = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            write_card(save_directory, repo_id if push_to_hub else None)
        if push_to_hub and is_main_process:
            options |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(repo_id, **options)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        force: bool = False,
        original: PreTrainedModel | str | Path | None = None,
        texts: Iterable[str] | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> CommitInfo:
        """Push to the Hub: weights, the code that loads them, and a card.

        Args:
            repo_id: the repository; it is created where there is none.
            force: push even what the fidelity check refuses.
            original: for the fidelity check; see :func:`hf_sqf.hub.check`. The check runs unless its result for these
                very weights is on record, ``max_kl`` and ``min_cosine`` of the config are both None, or the original
                is not on this machine; the card then says that nothing was measured.
            texts: for the fidelity check.
            max_shard_size: as in ``save_pretrained``.
            kwargs: see :func:`hf_sqf.hub.push`.

        Raises:
            Unfaithful: the model lies too far from its original.
        """
        from .checking import OriginalMissing, check, config_of, fingerprint
        from .pushing import push

        config = config_of(self)
        if config.fidelity is not None and config.fidelity.get("weights") != fingerprint(self):
            config.fidelity = None
        asked = original is not None or texts is not None
        if asked or (config.fidelity is None and not config.max_kl is config.min_cosine is None):
            try:
                check(self, original, texts)
            except OriginalMissing as error:
                logger.warning("%s is pushed without a fidelity check: %s", repo_id, error)
        kwargs["tags"] = [*(self.model_tags or []), *(kwargs.get("tags") or [])]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push(folder, repo_id, force=force, **kwargs)


MIXINS.insert(0, SavesWithCard)

"""What `compat: original` changes in SIMLA, ALBEF and their tasks: every switch, in one place."""

from dataclasses import dataclass

from base.errors import UserError


@dataclass(frozen=True)
class Compat:
    """Where the published code's numbers differ from ours; docs/DIFFERENCES.md has the reasons."""

    teacher_dropout: bool = False  # momentum copies are in train mode with the student
    keys_of_rank: bool = False  # ITA: the batch's keys are this rank's, not those of all ranks
    means_of_rank: bool = False  # MLM, MIM: means over this rank's masked positions
    # the teachers of MIM and of the keywords read the student's states
    student_states: bool = False
    any_keyword: bool = False  # keywords may be padding and any special token but [CLS]
    soft_mlm_over_text: bool = False  # MLM: the soft loss takes its softmax over the text axis
    ids_not_queued: bool = False  # retrieval: captions of one image in the queue are negatives
    free_temperature: bool = False  # retrieval: the temperature is not clamped
    teacher_unused: bool = False  # VQA: alpha never reaches the decoder
    first_token_twice: bool = False  # VQA: counted twice when answers are ranked
    padding_in_map: bool = False  # grounding: the map is the mean over padding, too

    @classmethod
    def of(cls, compat: str, simla: bool) -> "Compat":
        """The switches of SIMLA's published code or of ALBEF's; none of them without `original`."""
        if compat not in ("none", "original"):
            raise UserError(
                f"compat is {compat!r}: it takes 'none' (defects fixed) or 'original' (the "
                "published numbers)"
            )
        if compat == "none":
            return cls()
        return cls(
            teacher_dropout=True,
            keys_of_rank=True,
            means_of_rank=True,
            student_states=True,
            any_keyword=True,
            soft_mlm_over_text=simla,
            ids_not_queued=simla,
            free_temperature=not simla,
            teacher_unused=simla,
            first_token_twice=True,
            padding_in_map=True,
        )

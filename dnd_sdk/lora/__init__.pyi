from .layout import ALL_LINEAR as ALL_LINEAR, LoraLayout as LoraLayout, MAX_RANK as MAX_RANK, Segment as Segment
from .linear import (
    Adapted as Adapted,
    attach_lora as attach_lora,
    tables_from_flat as tables_from_flat,
    use_lora as use_lora,
    using as using,
)
from .merge import merge_flats as merge_flats, merge_sharing_a as merge_sharing_a
from .packing import GroupViews as GroupViews, Packing as Packing
from .ranks import narrowed as narrowed, widened as widened
from .segments import SegmentedLora as SegmentedLora, TokenSegment as TokenSegment

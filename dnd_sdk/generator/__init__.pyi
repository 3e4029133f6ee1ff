from .card import record_evaluation as record_evaluation, write_card as write_card
from .generator import (
    Generator as Generator,
    GeneratorConfig as GeneratorConfig,
    decoder_shapes as decoder_shapes,
    select_states as select_states,
)
from .weight_tokenizer import WeightTokenizer as WeightTokenizer

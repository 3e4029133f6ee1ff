from .card import record_evaluation as record_evaluation, write_card as write_card
from .finding import (
    bases_with_generator as bases_with_generator,
    generator_folder as generator_folder,
    measured_matches as measured_matches,
    shipped_folder as shipped_folder,
    without_generator as without_generator,
)
from .generator import (
    FORMAT_VERSION as FORMAT_VERSION,
    Generator as Generator,
    GeneratorConfig as GeneratorConfig,
    decoder_shapes as decoder_shapes,
    select_states as select_states,
)
from .loading import check_encoder as check_encoder, folder_for as folder_for, load_generator as load_generator
from .weight_tokenizer import WeightTokenizer as WeightTokenizer

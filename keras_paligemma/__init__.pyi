from .compat import without_values as without_values
from .config import TextDecoderConfig as TextDecoderConfig
from .config import VisionEncoderConfig as VisionEncoderConfig
from .generation.answer import Answer as Answer
from .generation.prefix import Prefix as Prefix
from .generation.programs import keep_compilations as keep_compilations
from .models.backbone import PaliGemmaBackbone as PaliGemmaBackbone
from .models.causal_lm import PaliGemmaCausalLM as PaliGemmaCausalLM
from .preprocessing.image_converter import (
    PaliGemmaImageConverter as PaliGemmaImageConverter,
)
from .preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor as PaliGemmaCausalLMPreprocessor,
)
from .preprocessing.tokenizer import PaliGemmaTokenizer as PaliGemmaTokenizer
from .tuning.losses import StreamedCrossEntropy as StreamedCrossEntropy
from .tuning.optimizers import Adam as Adam
from .tuning.optimizers import transfer_recipe as transfer_recipe

__version__: str

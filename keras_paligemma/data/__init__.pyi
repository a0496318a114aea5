from .coco import COCOSource as COCOSource
from .conversations import ConversationSource as ConversationSource
from .examples import ExampleError as ExampleError
from .examples import check as check
from .fields import FieldSource as FieldSource
from .jsonl import JSONLSource as JSONLSource
from .pipeline import Batches as Batches

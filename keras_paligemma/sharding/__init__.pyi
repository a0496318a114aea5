from .auto_distribution import auto as auto
from .layouts import Layout as Layout
from .layouts import Sharded as Sharded
from .layouts import data_shard as data_shard
from .layouts import distribute as distribute

"""How signatures are checked under pytest: by beartype, with whole numbers welcome where a float is expected."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

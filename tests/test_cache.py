"""The inversion cache."""

from test_train_inversion_dpo import assert_same, lora


def test_a_warm_run_equals_a_cold_one(train, tmp_path):
    options = {"inversion_cache_dir": tmp_path / "cache", "max_train_steps": 5, "cached_timesteps": 2}
    cold = lora(train("cold", **options))
    assert_same(lora(train("warm", **options)), cold)

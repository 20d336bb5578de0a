"""Random fitted models of every kind that the readers of packed forests take."""

import tempfile
import warnings
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import xgboost
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

import fastens

SPECIAL = [0.0, -0.0, 1e-35, -1e-35, 1e-36, 5e-324, -5e-324, 1e-40, 1.0, -1.0, 0.1, 16777217.0, 1e30, -1e30]


def choice(rng, options):
    return options[rng.integers(len(options))]


def training_table(rng, missing):
    """Columns of normal values, of few values, of special ones, and with ties: [n, d]."""
    n, d = int(rng.integers(20, 120)), int(rng.integers(1, 7))
    columns = []
    for _ in range(d):
        kind = rng.integers(5)
        if kind == 0:
            column = rng.choice(SPECIAL, n)
        elif kind == 1:
            column = rng.integers(-3, 4, n).astype(float)
        elif kind == 2:
            column = rng.integers(0, 2**40, n).astype(float)
        else:
            column = rng.normal(size=n) * 10.0 ** rng.integers(-3, 4)
        columns.append(column)
    x = np.stack(columns, 1)
    if missing:
        x[rng.random(x.shape) < 0.15] = np.nan
    return x


def targets(rng, x, outputs):
    rank = np.nan_to_num(x).argsort(0).argsort(0) / len(x)
    y = rank @ rng.normal(size=(x.shape[1], outputs)) * 5 + np.isnan(x).sum(1, keepdims=True) + rng.normal(size=outputs)
    y += rng.normal(size=y.shape)
    return y[:, 0] if outputs == 1 else y


def named(rng, x):
    """The table as an array, or as a frame that names its columns."""
    if rng.random() < 0.5:
        return x
    return pd.DataFrame(x, columns=[f"column {chr(97 + i)}" for i in rng.permutation(x.shape[1])])


def of_sklearn(rng):
    kind = choice(rng, [RandomForestRegressor, ExtraTreesRegressor])
    options = {"n_estimators": int(rng.integers(1, 9)), "max_depth": choice(rng, [1, 3, 7, None]), "random_state": 0}
    options["criterion"] = choice(rng, ["squared_error", "friedman_mse", "poisson", "absolute_error"])
    options["max_features"] = choice(rng, [1.0, 1, "sqrt"])
    options |= choice(
        rng, [{}, {"max_leaf_nodes": 9}, {"min_samples_leaf": 4}, {"ccp_alpha": 0.05}, {"bootstrap": True}]
    )
    missing = options["criterion"] not in ("absolute_error",) and rng.random() < 0.4
    x = training_table(rng, missing)
    if not missing and rng.random() < 0.2 and options["criterion"] == "squared_error":
        options["monotonic_cst"] = rng.integers(-1, 2, x.shape[1]).tolist()
        y = targets(rng, x, 1)
    else:
        y = targets(rng, x, choice(rng, [1, 1, 3]))
    y = np.abs(y) if options["criterion"] == "poisson" else y
    model = kind(**options).fit(named(rng, x), y)
    return x, [model], lambda: fastens.Forest.from_sklearn(model), lambda m, table: m.predict(table)


def of_xgboost(rng):
    x = training_table(rng, rng.random() < 0.5)
    y = targets(rng, x, choice(rng, [1, 1, 3]))
    options = {"n_estimators": int(rng.integers(1, 15)), "max_depth": int(rng.integers(1, 7)), "n_jobs": 1}
    options |= choice(rng, [{}, {"base_score": 0.25}, {"gamma": 2.0}, {"learning_rate": 1.0}, {"num_parallel_tree": 3}])
    options |= choice(rng, [{}, {"tree_method": "exact"}, {"tree_method": "approx"}, {"max_bin": 4}])
    options |= choice(rng, [{}, {}, {"booster": "dart", "rate_drop": 0.5, "one_drop": 1}])
    options |= choice(rng, [{}, {}, {"objective": "reg:absoluteerror"}, {"objective": "reg:pseudohubererror"}])
    if rng.random() < 0.1:
        options |= {"objective": "reg:quantileerror", "quantile_alpha": choice(rng, [0.3, [0.2, 0.8]])}
        y = y if y.ndim == 1 else y[:, 0]
    if "max_bin" in options and options.get("tree_method") == "exact":
        options.pop("max_bin")
    table = named(rng, x)
    kind = xgboost.XGBRFRegressor if rng.random() < 0.2 else xgboost.XGBRegressor
    if kind is xgboost.XGBRFRegressor:
        options = {name: options[name] for name in ("n_estimators", "max_depth", "n_jobs")}
    stop = kind is xgboost.XGBRegressor and rng.random() < 0.4
    if stop:
        rounds = int(rng.integers(1, 4))
        callback = {"callbacks": [xgboost.callback.EarlyStopping(rounds=rounds, save_best=bool(rng.integers(2)))]}
        callback = callback if options.get("booster") != "dart" else {"early_stopping_rounds": rounds}
        options |= choice(rng, [{"early_stopping_rounds": rounds}, callback])
        options["n_estimators"] = 25
    models = []
    for seed in range(choice(rng, [1, 1, 1, 2])):
        model = kind(**options, random_state=seed)
        held_out = table[len(x) // 2 :], y[len(x) // 2 :]
        model.fit(
            table[: len(x) // 2], y[: len(x) // 2], **({"eval_set": [held_out], "verbose": False} if stop else {})
        )
        models.append(model)
    if rng.random() < 0.3:
        models = [reloaded(model, kind) for model in models]
    if rng.random() < 0.3:
        models = [model.get_booster() for model in models]
        return x, models, lambda: fastens.Forest.from_xgboost(models), lambda m, t: m.inplace_predict(t)
    return x, models, lambda: fastens.Forest.from_xgboost(models), lambda m, t: m.predict(t)


def reloaded(model, kind):
    with tempfile.TemporaryDirectory() as folder:
        model.save_model(Path(folder) / "model.json")
        fresh = kind(n_jobs=1)
        fresh.load_model(Path(folder) / "model.json")
    return fresh


def of_lightgbm(rng):
    x = training_table(rng, rng.random() < 0.5)
    y = targets(rng, x, 1)
    options = {"n_estimators": int(rng.integers(1, 15)), "num_leaves": int(rng.integers(2, 20)), "verbose": -1}
    options |= {"n_jobs": 1, "min_child_samples": int(rng.integers(1, 10)), "min_child_weight": 0.0}
    options |= choice(rng, [{}, {"objective": "quantile"}, {"objective": "huber"}, {"objective": "regression_l1"}])
    options |= choice(rng, [{}, {"use_missing": False}, {"max_bin": 5}, {"extra_trees": True}, {"learning_rate": 1.0}])
    bagged = {"boosting_type": "rf", "subsample": 0.5, "subsample_freq": 1}
    options |= choice(rng, [{}, {}, {"boosting_type": "dart"}, bagged])
    table, stop = named(rng, x), rng.random() < 0.3 and options.get("boosting_type") != "dart"
    fit = {}
    if stop:
        half = len(x) // 2
        fit = {"eval_set": [(table[half:], y[half:])], "callbacks": [lightgbm.early_stopping(2, verbose=False)]}
    count = 1 if "boosting_type" in options else choice(rng, [1, 1, 2])
    models = [lightgbm.LGBMRegressor(**options, random_state=seed).fit(table, y, **fit) for seed in range(count)]
    if rng.random() < 0.4:
        models = [model.booster_ for model in models]
    elif rng.random() < 0.3:
        models = [lightgbm.Booster(model_str=model.booster_.model_to_string()) for model in models]
    return x, models, lambda: fastens.Forest.from_lightgbm(models), lambda m, t: m.predict(t)


def of_sklearn_otherwise(rng):
    """Forests that were grown in parts, cut, weighted, or fitted to targets of other shapes and types."""
    x = training_table(rng, rng.random() < 0.3)
    y = targets(rng, x, choice(rng, [1, 1, 2]))
    y = choice(rng, [y, y.astype(np.float32), np.round(y).astype(int), y.reshape(len(y), -1), np.zeros_like(y)])
    kind = choice(rng, [RandomForestRegressor, ExtraTreesRegressor])
    options = {"n_estimators": int(rng.integers(2, 7)), "random_state": 1, "max_depth": choice(rng, [2, None])}
    options |= choice(rng, [{}, {"min_impurity_decrease": 0.1}, {"max_samples": 0.5, "bootstrap": True}])
    model = kind(**options, warm_start=True)
    weight = rng.random(len(x)) + 0.1 if rng.random() < 0.5 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns [n, 1]
        model.fit(table := named(rng, x), y, sample_weight=weight)
        if rng.random() < 0.5:
            model.set_params(n_estimators=options["n_estimators"] + 2).fit(table, y, sample_weight=weight)
    if rng.random() < 0.3:
        model.estimators_ = model.estimators_[1:]
    return x, [model], lambda: fastens.Forest.from_sklearn(model), lambda m, t: m.predict(t)


def of_xgboost_otherwise(rng):
    """Boosters that were trained further, cut, constrained, told their best round, or of kinds that are refused."""
    x = training_table(rng, rng.random() < 0.5)
    y = targets(rng, x, 1)
    names = [f"f{i}" for i in rng.permutation(x.shape[1])] if rng.random() < 0.5 else None
    options = {"max_depth": int(rng.integers(0, 6)), "nthread": 1, "seed": 0, "verbosity": 0}
    options |= choice(rng, [{}, {"grow_policy": "lossguide", "max_leaves": 5}, {"subsample": 0.5}, {"lambda": 0.0}])
    options |= choice(rng, [{}, {"colsample_bynode": 0.5}, {"min_child_weight": 0.0}, {"alpha": 1.0}])
    options |= choice(rng, [{}, {"monotone_constraints": (1,) + (0,) * (x.shape[1] - 1)}, {"base_score": -3.0}])
    options |= choice(
        rng,
        [{}] * 6 + [{"booster": "gblinear"}, {"objective": "reg:logistic"}, {"multi_strategy": "multi_output_tree"}],
    )
    if options.get("multi_strategy"):
        y = targets(rng, x, 2)
    if options.get("objective"):
        y = (y > y.mean()).astype(float)
    held = xgboost.DMatrix(x, y, feature_names=names)
    booster = xgboost.train(options, held, int(rng.integers(1, 12)))
    change = rng.integers(6)
    if change == 0:
        booster = xgboost.train(options, held, 3, xgb_model=booster)
    elif change == 1 and options.get("booster") != "gblinear" and booster.num_boosted_rounds() > 2:
        booster = booster[1 : booster.num_boosted_rounds() - 1]
    elif change == 2:
        booster.set_attr(best_iteration="0")
    elif change == 3:
        update = {"process_type": "update", "updater": "refresh", "refresh_leaf": True}
        booster = xgboost.train({**options, **update}, held, booster.num_boosted_rounds(), xgb_model=booster)
    elif change == 4:
        booster = booster.copy()
    models = [booster]
    if rng.random() < 0.4:  # the same booster as an estimator, as from a file of another program
        with tempfile.TemporaryDirectory() as folder:
            booster.save_model(path := Path(folder) / "model.ubj")
            model = xgboost.XGBRegressor(n_jobs=1)
            model.load_model(path)
        return x, [model], lambda: fastens.Forest.from_xgboost(model), lambda m, t: m.predict(t)
    return x, models, lambda: fastens.Forest.from_xgboost(models), lambda m, t: m.inplace_predict(t)


def of_lightgbm_otherwise(rng):
    """Boosters that were trained further, cut, refitted, told their best round, or of kinds that are refused."""
    x = training_table(rng, rng.random() < 0.5)
    y = targets(rng, x, 1)
    options = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": int(rng.integers(1, 9)), "min_data_in_bin": 1}
    options |= choice(rng, [{}, {"monotone_constraints": [1] + [0] * (x.shape[1] - 1)}, {"path_smooth": 1.0}])
    options |= choice(rng, [{}, {"boost_from_average": False}, {"data_sample_strategy": "goss"}, {"lambda_l1": 1.0}])
    options |= choice(rng, [{}, {"objective": "fair"}, {"objective": "mape"}, {"objective": "regression_l2"}])
    options |= choice(rng, [{}] * 6 + [{"linear_tree": True}, {"zero_as_missing": True}, {"reg_sqrt": True}])
    options |= choice(
        rng, [{}] * 6 + [{"objective": "poisson"}, {"num_iteration_predict": 2}, {"pred_early_stop": True}]
    )
    y = np.abs(y) if options.get("objective") == "poisson" else y
    table = named(rng, x)
    if rng.random() < 0.2 and isinstance(table, pd.DataFrame):
        whole = np.clip(np.nan_to_num(x[:, 0]), -3, 3).round()
        table = table.assign(**{table.columns[0]: pd.Categorical(whole)})
        options.pop("monotone_constraints", None)  # of a category, LightGBM ends the process
    held = lightgbm.Dataset(table, y, free_raw_data=False)
    booster = lightgbm.train(options, held, int(rng.integers(1, 12)), keep_training_booster=True)
    change = rng.integers(7)
    if change == 0:
        booster = lightgbm.train(options, held, 3, init_model=booster)
    elif change == 1:
        booster.rollback_one_iter()
    elif change == 2:
        booster.best_iteration = 1
    elif change == 3:
        booster = booster.refit(table, y + 1.0)
    elif change == 4:
        booster.set_leaf_output(0, 0, 5.0)
    elif change == 5:
        booster.shuffle_models()
    if rng.random() < 0.3:
        booster = lightgbm.Booster(model_str=booster.model_to_string())
    return x, [booster], lambda: fastens.Forest.from_lightgbm(booster), lambda m, t: m.predict(t)


LIBRARIES = {
    "sklearn": (of_sklearn, of_sklearn, of_sklearn_otherwise),
    "xgboost": (of_xgboost, of_xgboost, of_xgboost_otherwise),
    "lightgbm": (of_lightgbm, of_lightgbm, of_lightgbm_otherwise),
}


def of_forest_diffusion(rng):
    """A fitted ``ForestDiffusionModel`` of few levels, small trees, and any of its learners."""
    from ForestDiffusion.diffusion_with_trees_class import ForestDiffusionModel

    learner = choice(rng, ["random_forest", "xgboost", "xgboost", "lgbm"])
    missing = learner != "random_forest" and rng.random() < 0.3
    x = rng.normal(size=(40, int(rng.integers(2, 5)))) * 10.0 ** rng.integers(-2, 3)
    x[rng.random(x.shape) < 0.15 * missing] = np.nan
    options = {
        "model": learner,
        "n_t": 3,
        "n_estimators": int(rng.integers(2, 8)),
        "max_depth": int(rng.integers(2, 6)),
    }
    options |= {"diffusion_type": choice(rng, ["vp", "flow"]), "duplicate_K": 3, "n_jobs": 1}
    options |= {"p_in_one": learner != "lgbm" and not missing and rng.random() < 0.6}
    options |= {"n_batch": int(learner == "xgboost" and rng.integers(2))}
    labels = rng.integers(0, 2, 40) if rng.random() < 0.5 else None
    return ForestDiffusionModel(x, label_y=labels, **options)

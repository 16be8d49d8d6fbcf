"""The tests that `pytest -m smoke` runs: of every package and of every law at least one, in less than a minute on two cores."""

SMOKE = (
    "checkpoint/test_formats.py",
    "checkpoint/test_round_trip.py",
    "cli/test_commands.py::test_verify_names_every_kind_of_damage",
    "cli/test_commands.py::test_diff_says_how_far_tensors_are_apart",
    "compile/test_stages.py::test_a_stage_is_traced_bitwise[clip_norm",
    "compile/test_stages.py::test_loss_scaling_goes_on_without_a_graph",
    "data/test_items.py",
    "data/test_permutation.py",
    "data/test_source.py",
    "fit/test_compose.py",
    "fit/test_parse.py",
    "fit/test_preflight.py",
    "gradients/test_accumulate.py",
    "gradients/test_clip.py",
    "gradients/test_grad.py",
    "laws/test_accumulation.py::test_gradients_of_micro_batches_are_those_of_the_whole[transformer",
    "laws/test_bad_input.py::test_what_is_no_state_yet_is_told_how_to_become_one",
    "laws/test_bad_input.py::test_nonsense_is_refused_where_it_is_given[fit",
    "laws/test_compiled.py::test_a_traced_step_is_the_eager_one_with_every_combinator[clip_norm]",
    "laws/test_composition.py",
    "laws/test_contexts.py::test_an_evaluation_within_inference_mode_is_that_outside",
    "laws/test_donation.py::test_after_a_step_its_input_cannot_be_read_and_its_output_can[two optimizers-a",
    "laws/test_lists.py",
    "laws/test_purity.py::test_a_step_twice_from_one_state_gives_bitwise_the_same[frozen parts-a",
    "laws/test_resume.py::test_a_file_holds_the_state_and_going_on_from_it_is_going_on[mlp with BatchNorm and dropout-all of them",
    "laws/test_resume.py::test_a_file_holds_the_state_and_going_on_from_it_is_going_on[two optimizers-e",
    "laws/test_syncs.py::test_no_step_waits_for_the_device_between_two_ticks[clip_",
    "loop/test_checkpoint_every.py",
    "loop/test_epoch_means.py",
    "loop/test_evaluate_every.py",
    "loop/test_log_to.py",
    "loop/test_run.py",
    "loop/test_stop_when.py",
    "metrics/test_counted.py",
    "metrics/test_join.py",
    "metrics/test_metrics.py",
    "nonfinite/test_check_finite.py",
    "nonfinite/test_skip.py",
    "optim/test_conditional_step.py",
    "optim/test_groups.py",
    "optim/test_names.py",
    "parallel/test_world.py",
    "pipe",
    "precision/test_precision.py",
    "report/test_report.py",
    "repo/test_exports.py",
    "repo/test_imports.py::test_imports_point_to_lower_floors_only",
    "repo/test_smoke.py",
    "runtime/test_host_callbacks.py",
    "runtime/test_wall_time.py",
    "schedules/test_schedules.py",
    "sinks/test_jsonl.py",
    "state",
    "step/test_averages.py",
    "step/test_update.py",
    "tensors/test_rng.py",
    "tensors/test_tree.py",
    "testing/test_testing.py",
    "triggers",
)
"""Where they are in this folder: what the name of a folder, a file or a test begins with. A test of tests/repo sees that no package is missing."""

TOO_LONG = (
    "checkpoint/test_round_trip.py::test_a_new_process_reads_the_same",
    "data/test_permutation.py::test_every_sample_is_as_likely_anywhere",
    "sinks/test_jsonl.py::test_a_disk_that_fills_up_within_a_line_leaves_complete_lines",
    "sinks/test_jsonl.py::test_the_next_run_continues_the_log_of_a_killed_run",
    "tensors/test_tree.py::test_any_tree_equals_its_copy",
)
"""Those of these files that take seconds each."""


def is_smoke(node: str) -> bool:
    """Whether a test, by its pytest name such as ``tests/pipe/test_pipe.py::test_...``, is one of them."""
    return node.removeprefix("tests/").startswith(SMOKE) and not node.removeprefix("tests/").startswith(TOO_LONG)


def holds_smoke(path: str) -> bool:
    """Whether a folder or a file, by its path in this folder, may hold one of them."""
    return any(place.startswith(path) or path.startswith(place) for place in SMOKE)

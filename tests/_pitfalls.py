"""The index of pitfalls: which tests show that what went wrong in other tools does not go wrong here.

Numbers and order are those of the survey of other tools (issue 7). A test that is renamed or deleted takes its pitfall
with it, and `test_pitfalls.py` says so.
"""

# pitfall: where it is tested, as `file::test`
PITFALLS: dict[int, tuple[str, ...]] = {
    # discovery and matching
    1: (  # an activation inside the norm, dropped with it
        "test_pitfalls::test_pitfall_01_every_fused_activation_is_kept",
        "test_norms::test_pitfall_1_fused_activation_and_dropout_are_seen",
        "test_norms::test_pitfall_1_activation_survives_timms_own_conversions",
        "test_apply::test_activation_and_dropout_are_the_same_objects",
    ),
    2: (  # a check that passes while norms are left
        "test_pitfalls::test_pitfall_02_what_is_left_stays_in_sight",
        "test_inspect::test_pitfall_2_and_3_an_unknown_norm_is_a_site_with_a_reason",
    ),
    3: (  # subclasses rebuilt as their base
        "test_pitfalls::test_pitfall_03_other_packages_subclasses_are_refused",
        "test_norms::test_pitfall_3_unknown_subclasses_are_refused",
        "test_norms::test_pitfall_3_quantised_norms_are_refused",
        "test_norms::test_third_parties_register_their_norm",
    ),
    4: (  # InstanceNorm and the like taken for BatchNorm
        "test_norms::test_pitfall_4_other_norms_are_not_batchnorms",
        "test_inspect::test_pitfall_4_other_norms_are_left_alone_by_name",
    ),
    5: (  # lazy norms
        "test_norms::test_pitfall_5_lazy_norms_ask_for_a_dry_forward",
        "test_norms::test_pitfall_5_lazy_norm_after_its_first_input",
        "test_inspect::test_pitfall_5_lazy_norms_are_refused",
    ),
    6: (  # the model is itself the norm
        "test_inspect::test_pitfall_6_the_root_itself",
        "test_sites::test_pitfall_6_a_root_norm_is_replaced_by_being_returned",
        "test_apply::test_every_kind_of_model",
    ),
    7: (  # one norm under two names
        "test_inspect::test_pitfall_7_aliases",
        "test_sites::test_pitfall_7_a_norm_under_several_names_is_found_once_with_all",
        "test_sites::test_pitfall_7_all_names_get_the_same_new_module",
        "test_apply::test_every_kind_of_model",
    ),
    8: (  # one norm called on two inputs
        "test_apply::test_pitfall_8_a_norm_called_on_two_inputs",
        "test_calibrate::test_calls_of_one_norm_are_pooled",
        "test_heal::TestRefusals::test_layers_that_are_used_differently",
    ),
    9: (  # setattr with a dotted name
        "test_apply::test_pitfall_9_no_phantom_modules",
        "test_sites::test_pitfall_9_and_10_any_parent_and_no_phantom",
        "test_sites::test_pitfall_9_a_phantom_of_an_earlier_tool_is_refused",
    ),
    10: ("test_sites::test_pitfall_9_and_10_any_parent_and_no_phantom",),  # parents with words for names
    11: (  # frozen norms of four packages, their eps, and functional calls
        "test_norms::test_pitfall_11_eps_of_frozen_norms",
        "test_norms::test_pitfall_11_transformers_frozen_norm_has_a_fixed_eps",
        "test_inspect::test_pitfall_11_functional_calls_are_reported_as_unreachable",
        "test_inspect::test_pitfall_11_weight_standardisation_is_no_norm_of_activations",
        "test_forwards::test_pitfall_11_functional_calls_are_found",
    ),
    12: (  # wrapped models
        "test_sites::test_pitfall_12_wrapped_models_are_refused_with_advice",
        "test_sites::test_pitfall_12_distributed_wrappers_are_refused",
        "test_inspect::test_pitfall_12_wrapped_models",
    ),
    # state
    13: (  # dtype, device, flags, eps
        "test_apply::test_pitfall_13_dtype",
        "test_apply::test_pitfall_13_flags_and_identity",
        "test_apply::test_pitfall_13_meta_device",
    ),
    14: (  # no gamma, no beta, no statistics
        "test_norms::test_pitfall_14_missing_affine_and_statistics",
        "test_inspect::test_pitfall_14_what_is_missing_is_said",
        "test_apply::test_the_layer_computes_the_definition",
        "test_apply::test_without_running_statistics_it_is_torchs_group_norm",
    ),
    15: (  # frozen norms are skipped, or thawed
        "test_inspect::test_pitfall_15_frozen_norms",
        "test_apply::test_pitfall_15_frozen_norms_are_converted_and_stay_frozen",
    ),
    16: (  # hooks, parametrisations, attributes
        "test_apply::test_pitfall_16_hooks_of_every_kind_and_their_handles",
        "test_apply::test_pitfall_16_custom_attributes",
        "test_norms::test_pitfall_16_parametrised_affine_is_refused",
        "test_norms::test_pitfall_16_pruned_affine_is_refused",
        "test_norms::test_pitfall_16_foreign_attributes_are_named",
        "test_inspect::test_pitfall_16_foreign_attributes_are_noted",
    ),
    17: (  # copies, pickles, checkpoints
        "test_apply::test_pitfall_17_copies_pickles_and_state_dicts",
        "test_layer::test_pitfall_17_state_dict_round_trip",
        "test_store::test_same_bits_and_revert_after_loading",
    ),
    18: ("test_revert::test_pitfall_18_bit_for_bit",),  # the way back
    19: (  # optimizers from before, and groups of parameters
        "test_apply::test_pitfall_19_an_optimizer_from_before_still_trains",
        "test_pitfalls::test_pitfall_19_no_decay_groups",
    ),
    20: ("test_apply::test_pitfall_20_initialising_again_resets_gamma_and_beta_only",),
    21: ("test_apply::test_pitfall_21_a_rebuilt_model_takes_the_stored_plan",),
    22: (  # BatchNorm tools that run afterwards
        "test_apply::test_pitfall_22_batchnorm_conversions_afterwards_do_nothing",
        "test_layer::test_pitfall_22_sync_and_freeze_leave_it_alone",
    ),
    23: (  # fusing and re-parameterising
        "test_apply::test_pitfall_23_reparameterising_comes_first",
        "test_layer::test_pitfall_23_batch_statistics_are_refused_with_advice",
        "test_layer::test_pitfall_23_folding_into_a_convolution_is_an_error",
    ),
    # numbers of groups
    24: (
        "test_grouping::test_pitfall_24_awkward_numbers_of_channels",
        "test_apply::test_pitfall_24_awkward_numbers_of_channels",
    ),
    25: (  # one channel a group, silently
        "test_grouping::test_pitfall_25_never_one_channel_per_group",
        "test_plan::test_pitfall_25_one_channel_per_group_never_comes_by_itself",
        "test_plan::test_pitfall_25_one_channel_per_group_by_name",
        "test_plan::test_a_changed_number_of_groups_is_one_warning_and_many_reasons",
    ),
    26: (  # groups of a handful of values: vectors and 1x1 maps
        "test_pitfalls::test_pitfall_26_vectors_and_maps_of_one_pixel_keep_what_they_say",
        "test_apply::test_pitfall_26_a_group_of_few_values_is_not_zeroed",
        "test_plan::test_pitfall_26_batchnorm1d_gets_one_soft_group",
    ),
    27: ("test_apply::test_the_layer_computes_the_definition", "test_apply::test_vectors"),  # 2-D to 5-D inputs
    # numerics
    28: (  # a large mean beside a small deviation
        "ops/test_group_norm::TestPitfall28LargeMean::test_forward_and_backward",
        "ops/test_group_norm::TestPitfall28LargeMean::test_the_reference_too",
        "ops/test_group_norm::test_pitfall_28_strides_that_only_look_like_channels_last",
        "ops/test_cpu::test_pitfall_28_a_large_mean_costs_no_digits_in_any_layout",
    ),
    29: (  # zero variance, eager and compiled
        "ops/test_group_norm::test_zero_variance_gives_the_bias_and_a_bounded_gradient",
        "test_pitfalls::test_pitfall_29_zero_variance_compiled_as_eager",
    ),
    30: (  # mixed precision
        "ops/test_group_norm::test_half_types_are_computed_in_fp32_and_rounded_once",
        "ops/test_op::test_autocast_keeps_the_dtype_of_the_input",
    ),
    31: (  # memory formats, slices, any C
        "ops/test_group_norm::test_pitfall_31_layout_changes_nothing_and_channels_last_is_kept",
        "ops/test_group_norm::test_a_slice_of_channels_last_gives_channels_last",
        "ops/test_group_norm::test_an_expanded_input_and_gradient",
        "ops/test_group_norm::test_channel_counts",
    ),
    32: (  # gradients, in-place activations, backward hooks
        "ops/test_group_norm::test_backward_is_as_accurate_as_torch",
        "ops/test_group_norm::test_gradcheck_and_gradgradcheck",
        "test_inplace::test_an_inplace_activation_after_the_layer",
        "test_pitfalls::test_pitfall_32_backward_hooks_and_in_place_activations",
    ),
    33: (  # one sample or many, training or not
        "ops/test_group_norm::test_claim_2_a_sample_has_the_same_bits_alone_and_in_a_batch",
        "test_layer::test_claim_2_train_is_eval_and_a_sample_is_itself_in_any_batch",
        "test_real_weights::test_one_sample_or_many_the_same_answer",
    ),
    # channel order
    34: (  # orders moved into weights, where the export does it
        "test_onnx_order::test_orders_go_into_the_weights_where_the_graph_allows_it",
        "test_onnx_order::test_what_others_read_too_is_not_folded_into",
        "test_onnx_order::test_a_whole_network_of_the_mobilenet_kind",
        "test_pitfalls::test_pitfalls_34_and_36_orders_through_whatever_mixes_channels",
    ),
    35: ("test_pitfalls::test_pitfall_35_an_order_moves_all_state_of_every_type",),
    36: (  # names that collide, several inputs and outputs, one output channel, nested concatenation
        "test_pitfalls::test_pitfalls_34_and_36_orders_through_whatever_mixes_channels",
        "test_pitfalls::test_pitfall_36_names_do_not_collide",
    ),
    37: (  # networks that cannot be traced
        "test_pitfalls::test_pitfall_37_orders_need_no_trace",
        "test_absorb::test_what_the_graph_does_not_prove_stays_and_is_said",
    ),
    38: (  # the same plan everywhere
        "test_pitfalls::test_pitfall_38_another_process_makes_the_same_plan",
        "test_plan::test_the_order_of_the_photos_does_not_matter",
        "test_order::test_the_same_tables_give_the_same_arrangement",
    ),
    # calibration and export
    39: (  # what calibration leaves behind
        "test_pitfalls::test_pitfall_39_calibration_leaves_everything_as_it_was",
        "test_calibrate::test_every_network_of_the_zoo",
        "test_calibrate::test_batches_order_and_shards_make_no_difference",
        "test_calibrate::test_photos_that_cannot_be_used",
    ),
    40: (  # photos help on photos that nobody has seen
        "test_pitfalls::test_pitfall_40_photos_help_on_other_photos",
        "test_tuning::test_corrections_that_harm_are_dropped",
    ),
    41: (  # ONNX's own GroupNormalization
        "test_export::test_pitfall_41_groupnorm_is_written_as_instancenorm",
        "test_export::test_pitfall_41_batch_height_and_width_are_dynamic_without_shape_nodes",
        "test_onnx_targets::test_every_lowering_computes_the_norm",
    ),
    42: (  # a GPU that was asked for and not used
        "test_validate::test_pitfall_42_a_provider_that_cannot_run_is_an_error_that_says_what_is_missing",
        "test_validate::test_pitfall_42_one_node_on_the_cpu_is_an_error_that_names_it",
        "test_validate::test_pitfall_42_no_assignment_proves_nothing",
        "test_validate::test_pitfall_42_a_session_that_moved_elsewhere_is_an_error",
        "test_validate::test_pitfall_42_a_refused_fallback_names_the_nodes",
        "test_onnx_targets::test_a_half_norm_far_from_zero",
    ),
    43: ("test_export::test_pitfall_43_between_input_and_output_an_order_is_one_gather_on_each_side",),
}

//! Layers with a window forget, and nothing that is computed shows it: all bits are those of caches that keep all keys.

use std::path::{Path, PathBuf};

use super::{KeyValueCache, LayerCache, RowsCache, room};
use crate::model::Model;
use crate::placement::Placement;
use crate::stage::Stage;

/// Golden models with windows of five tokens in all layers or in some: with sinks and soft caps,
/// with experts, with heads of two widths, with keys that are values, with keys of earlier layers,
/// with a gate.
const FAMILIES: [&str; 9] =
    ["gemma2", "gemma3", "gemma4", "gemma4_k_eq_v", "gemma4_moe", "gpt_oss", "mistral", "muse_glimmer", "olmo3"];

/// Most places that a layer with such a window has for a text that only goes on, and for one that serves later prompts.
const GOING_ON: usize = 96;
const FOR_LATER_PROMPTS: usize = 1536;

/// Models whose layers keep something of every kind, and some without windows.
const OF_ALL_KINDS: [&str; 10] =
    ["llama", "mistral", "gemma3", "gemma4", "gpt_oss", "olmo3", "deepseek_v3", "qwen3_5", "qwen3_next", "lfm2"];

fn directory(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family)
}

fn base(family: &str) -> Model {
    Model::load(&directory(family), &Placement::cpu(None)).expect("the model loads")
}

/// Tokens that say nothing: 3, 10, 17, ...
fn text(length: usize, first: u32) -> Vec<u32> {
    (0..length as u32).map(|n| (first + 7 * n) % 96).collect()
}

/// A cache whose layers keep all keys, as if they had no window.
fn keeping(model: &Model) -> KeyValueCache {
    let mut cache = KeyValueCache::default();
    cache.have_layers(&vec![None; model.config.layers.len()]);
    cache
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// Lets both read these tokens, and compares the logits behind them.
fn read_alike(model: &Model, tokens: &[u32], caches: [&mut KeyValueCache; 2], what: &str) {
    let [got, want] = caches.map(|cache| bits(&model.read(tokens, cache).expect("logits")));
    assert!(got == want, "{what}");
}

/// No layer has more room than one with a window may have, or than the tokens take.
fn assert_room(layers: &[LayerCache], of_window: usize, tokens: usize, what: &str) {
    for (n, layer) in layers.iter().enumerate() {
        let most = layer.reach.window.map_or(room(tokens), |_| of_window);
        assert!(layer.room_for(0) <= most, "{what}: layer {n} has {} places", layer.room_for(0));
    }
}

fn has_forgotten(layers: &[LayerCache]) -> bool {
    let windowed: Vec<_> = layers.iter().filter(|layer| layer.reach.window.is_some() && layer.keys.is_some()).collect();
    !windowed.is_empty() && windowed.iter().all(|layer| layer.start > 0)
}

/// Token by token, and in parts with more tokens than a layer with a window has places.
#[test]
fn a_text_goes_on_with_the_bits_that_it_has_with_all_keys() {
    for family in FAMILIES {
        let model = base(family);
        let (tokens, mut end) = (text(450, 3), 0);
        let (mut cache, mut all) = (KeyValueCache::of_one_text(), keeping(&model));
        for count in std::iter::once(20).chain([1; 150]).chain([200]).chain([1; 80]) {
            let what = format!("{family}: {count} behind {end} tokens");
            read_alike(&model, &tokens[end..end + count], [&mut cache, &mut all], &what);
            end += count;
            assert_room(&cache.layers, GOING_ON, end, &what);
            assert!(cache.bytes() <= model.row_bytes(end), "{what}: {} bytes", cache.bytes());
        }
        assert!(has_forgotten(&cache.layers) && cache.bytes() < all.bytes(), "{family}");
    }
}

/// A prompt in parts, then others that begin as a part of it.
#[test]
fn a_text_that_is_kept_goes_back_where_its_keys_are_or_is_read_again() {
    for family in FAMILIES {
        let model = base(family);
        let (first, mut cache, mut all) = (text(3000, 3), KeyValueCache::default(), keeping(&model));
        for part in first.chunks(512) {
            read_alike(&model, part, [&mut cache, &mut all], family);
            assert_room(&cache.layers, FOR_LATER_PROMPTS, cache.tokens.len(), family);
        }
        assert!(has_forgotten(&cache.layers), "{family}");
        let other = |shared: usize, more: usize| [&first[..shared], &text(more, 50)].concat();
        let goes_back = other(2000, 70);
        assert_eq!([&mut cache, &mut all].map(|cache| cache.keep_beginning_of(&goes_back)), [2000; 2], "{family}");
        read_alike(&model, &goes_back[2000..], [&mut cache, &mut all], family);
        let is_too_far = other(1000, 70);
        assert_eq!([&mut cache, &mut all].map(|cache| cache.keep_beginning_of(&is_too_far)), [0, 1000], "{family}");
        // What was forgotten counts no more.
        read_alike(&model, &is_too_far, [&mut cache, &mut keeping(&model)], family);
        assert_eq!(cache.keep_beginning_of(&other(64, 8)), 64, "{family}");
    }
}

/// Rows of different lengths. One that is longer than all joins them and leaves.
#[test]
fn rows_go_on_together_with_the_bits_that_they_have_with_all_keys() {
    let lengths = [1, 5, 150, 90, 300];
    for family in FAMILIES {
        let model = base(family);
        let of_row = |row: usize, mut cache: KeyValueCache| {
            model.read(&text(lengths[row], row as u32), &mut cache).expect("logits");
            cache
        };
        let forgetful = |row| of_row(row, KeyValueCache::default());
        let all = |row| of_row(row, keeping(&model));
        let mut rows = [RowsCache::join((0..4).map(forgetful).collect()), RowsCache::join((0..4).map(all).collect())];
        for step in 0..250 {
            let what = format!("{family}: step {step}");
            if step == 10 {
                rows[0].insert(forgetful(4), 1);
                rows[1].insert(all(4), 1);
            }
            if step == 130 {
                rows.iter_mut().for_each(|rows| rows.keep_and_shrink(&[0, 2, 3, 4]));
            }
            let tokens: Vec<u32> = (0..rows[0].lengths().len()).map(|row| (17 * row + 5 * step) as u32 % 96).collect();
            let [got, want] = rows.each_mut().map(|rows| bits(&model.read_rows(&tokens, rows).expect("logits")));
            assert!(got == want, "{what}");
            assert_room(&rows[0].layers, GOING_ON, rows[0].end, &what);
        }
        assert!(has_forgotten(&rows[0].layers), "{family}");
    }
}

/// Seven tokens are proposed each time, and from none to all of them are taken back.
#[test]
fn what_was_proposed_is_taken_back_behind_what_is_forgotten() {
    for family in FAMILIES {
        let model = base(family);
        let mut rows = [KeyValueCache::default(), keeping(&model)].map(|mut cache| {
            model.read(&text(90, 3), &mut cache).expect("logits");
            RowsCache::join(vec![cache])
        });
        for step in 0..80 {
            let tokens = text(8, 5 * step);
            let [got, want] = rows.each_mut().map(|rows| {
                let logits = model.begin_ahead(&tokens, rows).expect("logits").expect("all layers are here");
                rows.forget_last(step as usize % 8);
                bits(&logits)
            });
            assert!(got == want, "{family}: step {step}");
            assert_room(&rows[0].layers, GOING_ON, rows[0].end + 7, family);
        }
        assert!(has_forgotten(&rows[0].layers), "{family}");
    }
}

/// What is counted of a text is what it takes, and of one that goes on at most that.
#[test]
fn bytes_are_counted_as_layers_keep_them() {
    for family in OF_ALL_KINDS {
        let (model, mut cache) = (base(family), KeyValueCache::default());
        model.read(&text(300, 3), &mut cache).expect("logits");
        assert_eq!(cache.bytes(), model.prompt_bytes(300), "{family}");
        let mut rows = RowsCache::join(vec![cache; 3]);
        let bytes = |rows: &RowsCache| rows.layers.iter().map(LayerCache::bytes).sum::<usize>();
        let has_windows = model.cache_windows().iter().any(Option::is_some);
        for tokens in 301..500 {
            model.read_rows(&[1, 2, 3], &mut rows).expect("logits");
            let (got, counted) = (bytes(&rows), 3 * model.row_bytes(tokens));
            assert!(if has_windows { got <= counted } else { got == counted }, "{family}: {got} of {counted} bytes");
        }
        assert_eq!(has_windows, model.row_bytes(5000) < model.prompt_bytes(5000), "{family}");
    }
}

/// Two processes with two layers each, of which the second one has the only layer without a window.
/// Both count its bytes.
#[test]
fn of_processes_that_hold_layers_the_one_with_most_is_counted() {
    let place = base("olmo3").row_bytes(1000) / (3 * GOING_ON + 1024);
    assert_eq!(base("olmo3").row_bytes(1000), place * (3 * GOING_ON + 1024));
    for mine in 0..2 {
        let placement = Placement::cpu(None).with_stage(Some(Stage::contiguous(4, 2, mine)));
        let model = Model::load(&directory("olmo3"), &placement).expect("the layers load");
        assert_eq!(model.row_bytes(1000), place * (GOING_ON + 1024), "process {mine}");
    }
}

//! Bytes that a text takes in the caches of the layers, each as it keeps it.

use crate::config::{LayerConfig, MixerKind, Values};
use crate::decoder::cache::reach::{KeptFor, Reach, goes_back};
use crate::model::Model;

impl Model {
    /// Bytes of the keys, values and states of an answer that comes to have so many tokens, its
    /// prompt with them. Layers with a window hold about that. Of several processes that hold the
    /// layers it is the bytes of the one with most, so that all decide alike. Of slices of layers it
    /// is those of the heads that are here.
    pub fn row_bytes(&self, tokens: usize) -> usize {
        self.text_bytes(tokens, KeptFor::GoingOn)
    }

    /// The same of a prompt that is read or kept for later ones: layers with a window hold 1,024 tokens more, so that a
    /// prompt may go on from before its end.
    pub fn prompt_bytes(&self, tokens: usize) -> usize {
        self.text_bytes(tokens, KeptFor::LaterPrompts)
    }

    /// The most bytes of a request, while its prompt is read and while it is answered.
    pub fn request_bytes(&self, prompt: usize, answer: usize) -> usize {
        self.prompt_bytes(prompt).max(self.row_bytes(prompt.saturating_add(answer)))
    }

    /// The window of each layer's cache. `None`: it keeps all keys, or none.
    pub(crate) fn cache_windows(&self) -> Vec<Option<usize>> {
        self.config.layers.iter().map(cache_window).collect()
    }

    /// Whether a text of `longest` tokens that was kept for later prompts goes back to its first `length` ones, in a
    /// model without states.
    pub(crate) fn goes_back(&self, longest: usize, length: usize) -> bool {
        goes_back(self.config.layers.iter().map(cache_window), longest, length)
    }

    fn text_bytes(&self, tokens: usize, kept_for: KeptFor) -> usize {
        let layers = self.config.layers.iter().map(|layer| self.layer_bytes(layer, tokens, kept_for));
        let Some(stage) = self.placement().stage() else { return layers.fold(0, usize::saturating_add) };
        let mut of_processes = vec![0usize; stage.count()];
        for (bytes, &process) in layers.zip(stage.of_layer.iter()) {
            of_processes[process] = of_processes[process].saturating_add(bytes);
        }
        of_processes.into_iter().max().unwrap_or(0)
    }

    fn layer_bytes(&self, layer: &LayerConfig, tokens: usize, kept_for: KeptFor) -> usize {
        let (config, of_number) = (&self.config, self.placement().compute().bytes());
        let places = Reach::new(cache_window(layer), kept_for).places(tokens);
        match (layer.mixer, config.latent, config.delta, config.convolution) {
            (MixerKind::Attention, ..) => {
                let all = layer.key_value_heads;
                let heads = self.placement().slice().map_or(all, |slice| slice.heads(all).len());
                let has_own = !matches!(layer.values, Values::OfLayer(_));
                places.saturating_mul(usize::from(has_own) * 2 * heads * layer.head_dim * of_number)
            }
            // The short vector, and the elements of the keys that turn: every slice has all of them.
            (MixerKind::Latent, Some(latent), ..) => places.saturating_mul((latent.rank + latent.turned) * of_number),
            (MixerKind::Delta, _, Some(delta), _) => {
                let (keys, values) = (delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim);
                let inputs = (delta.taps - 1) * (2 * keys + values) * of_number;
                inputs + delta.key_dim * values * size_of::<f32>()
            }
            // Its state is one number that says nothing.
            (MixerKind::Convolution, _, _, Some(convolution)) => {
                (convolution.taps - 1) * config.hidden_size * of_number + size_of::<f32>()
            }
            _ => 0,
        }
    }
}

/// The window of a layer's cache. Latent attention keeps its short vectors, in a window too.
fn cache_window(layer: &LayerConfig) -> Option<usize> {
    layer.window.filter(|_| layer.mixer == MixerKind::Attention)
}

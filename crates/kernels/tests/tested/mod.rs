//! The device that the tests run on.

use std::sync::OnceLock;

use burn::tensor::Device;
use finetune_kernels::devices::gpus;

/// The CPU. With `FINETUNE_TEST_DEVICE=gpu` it is the first GPU, a software renderer if there is no other.
pub(crate) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let choose = || match std::env::var("FINETUNE_TEST_DEVICE").as_deref() {
        Ok("gpu") => {
            let gpu = gpus(true).into_iter().next().expect("a GPU, or a software renderer");
            println!("on {} through {}", gpu.name, gpu.api);
            gpu.device
        }
        _ => Device::flex(),
    };
    DEVICE.get_or_init(choose).clone()
}

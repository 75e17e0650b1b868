//! Codes, scales and bytes against those of mlx and bitsandbytes
//! (`scripts/make_packed_format_goldens.py`).

use std::path::PathBuf;

use finetune_packed::{
    PackedError, PackedMatrix, Scheme, Stored, applies, config_entry, file_bytes, file_tensors, memory, quantize,
};
use finetune_store::{Dtype, TensorFile, TensorView};
use half::{bf16, f16};

const STORED: [(&str, Stored); 3] = [("f32", Stored::F32), ("f16", Stored::F16), ("bf16", Stored::BF16)];

const SCHEMES: [(&str, Scheme); 5] = [
    ("mlx4", Scheme::Mlx4),
    ("mlx8", Scheme::Mlx8),
    ("mxfp4", Scheme::Mxfp4),
    ("nf4", Scheme::Nf4),
    ("int8", Scheme::Int8),
];

fn goldens(kind: &str) -> TensorFile {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/goldens/{kind}.safetensors"));
    TensorFile::open(&path).expect("a file of goldens")
}

fn half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// The numbers of a tensor in f32.
fn numbers(tensor: &TensorView) -> Vec<f32> {
    let bytes = tensor.bytes().expect("its bytes");
    let halves = || bytes.as_chunks::<2>().0.iter();
    match tensor.dtype {
        Dtype::F16 => halves().map(|half| f16::from_le_bytes(*half).to_f32()).collect(),
        Dtype::BF16 => halves().map(|half| bf16::from_le_bytes(*half).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect(),
    }
}

/// Calls with each (golden, what it is, scheme, stored, packed matrix).
fn for_all(mut test: impl FnMut(&TensorFile, &str, Scheme, Stored, &PackedMatrix)) {
    let mut matrices = 0;
    for (kind, stored) in STORED {
        let file = goldens(kind);
        for case in file.names().filter(|name| !name.contains('.')) {
            let tensor = file.get(case).expect("a matrix");
            let shape = [tensor.shape[0], tensor.shape[1]];
            for (name, scheme) in SCHEMES {
                if file.get(&format!("{case}.{name}.weight")).is_none() {
                    continue;
                }
                let packed = quantize(scheme, &numbers(&tensor), shape, stored).expect("a packed matrix");
                test(&file, &format!("{case}.{name}"), scheme, stored, &packed);
                matrices += 1;
            }
        }
    }
    assert_eq!(matrices, 3 * 21 + 2 * 4);
}

#[test]
fn tensors_have_the_bytes_of_the_reference() {
    for_all(|file, case, scheme, stored, packed| {
        let kind = file.path().display();
        let tensors = file_tensors(scheme, "layer.weight", packed.shape, stored);
        let written = file_bytes(scheme, packed);
        assert_eq!(tensors.len(), written.len());
        for (tensor, ours) in tensors.iter().zip(&written) {
            let name = tensor.name.strip_prefix("layer.").expect("a tensor of the layer");
            let theirs = file.get(&format!("{case}.{name}")).unwrap_or_else(|| panic!("{kind}: no {case}.{name}"));
            assert_eq!((tensor.dtype, &tensor.shape[..]), (theirs.dtype, theirs.shape), "{kind}: {case}.{name}");
            let theirs = theirs.bytes().expect("its bytes");
            let different = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
            assert_eq!((ours.len(), different), (theirs.len(), None), "{kind}: {case}.{name}");
        }
        // Nothing is missing: the others are the packed matrix decoded.
        let theirs = file.names().filter(|name| name.starts_with(&format!("{case}."))).count();
        assert_eq!(theirs, tensors.len() + 1, "{kind}: {case}");
    });
}

/// What mlx's affine form may differ by, as a part of the largest number of a row: mlx decodes in
/// the type of the matrix, with a rounding after each operation.
fn tolerance(scheme: Scheme, stored: Stored) -> f32 {
    match (scheme, stored) {
        (Scheme::Nf4 | Scheme::Int8 | Scheme::Mxfp4, _) => 0.0,
        (_, Stored::F32) => 2f32.powi(-23),
        (_, Stored::F16) => 2f32.powi(-10),
        (_, Stored::BF16) => 2f32.powi(-7),
    }
}

#[test]
fn values_are_those_of_the_reference() {
    for_all(|file, case, scheme, stored, packed| {
        let [rows, columns] = packed.shape;
        let mut ours = vec![0.0; rows * columns];
        ours.chunks_mut(columns).enumerate().for_each(|(row, out)| packed.decode_row(row, 0..columns, out));
        let theirs = numbers(&file.get(&format!("{case}.decoded")).expect("decoded values"));
        assert_eq!(ours.len(), theirs.len());
        for (row, (ours, theirs)) in ours.chunks(columns).zip(theirs.chunks(columns)).enumerate() {
            let largest = theirs.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let allowed = largest * tolerance(scheme, stored);
            for (column, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                // The largest numbers of mxfp4 are beyond f16, where mlx has infinity.
                let ours = if scheme == Scheme::Mxfp4 && stored == Stored::F16 { half(*ours) } else { *ours };
                let is_near = ours == *theirs || (ours - theirs).abs() <= allowed;
                let kind = file.path().display();
                assert!(is_near, "{kind}: {case}: {ours:e}, not {theirs:e} at {row}, {column}");
            }
        }
    });
}

#[test]
fn what_is_packed_is_whole_and_of_the_stated_size() {
    for_all(|file, case, scheme, stored, packed| {
        packed.check().unwrap_or_else(|error| panic!("{}: {case}: {error}", file.path().display()));
        assert_eq!(memory(scheme, packed.shape, stored), packed.bytes() as u64, "{case}");
    });
}

#[test]
fn what_cannot_be_packed_is_refused_with_its_place() {
    let with = |n: usize, value: f32| {
        let mut values = vec![0.5; 128];
        values[n] = value;
        values
    };
    let far_apart = {
        let mut values = with(70, 3e38);
        values[71] = -3e38;
        values
    };
    let all = || SCHEMES.map(|(_, scheme)| scheme).to_vec();
    let affine = || vec![Scheme::Mlx4, Scheme::Mlx8];
    let cases = [
        (all(), with(65, f32::INFINITY), [2, 64], "element 1 of row 1 is inf"),
        (all(), with(3, f32::NAN), [2, 64], "element 3 of row 0 is NaN"),
        (vec![Scheme::Int8], with(64, -70000.0), [2, 64], "element 0 of row 1 is -70000, and int8 is made from f16"),
        (affine(), vec![1.0; 96], [1, 96], "its 96 columns do not fill groups of 64"),
        (vec![Scheme::Mxfp4], vec![1.0; 48], [1, 48], "its 48 columns do not fill groups of 32"),
        (affine(), far_apart, [2, 64], "elements 0 to 63 of row 1 are further apart than f32 reaches"),
        (all(), Vec::new(), [0, 64], "it has no elements"),
    ];
    for (schemes, values, shape, what) in cases {
        for scheme in schemes {
            let error = quantize(scheme, &values, shape, Stored::F32).expect_err(what);
            assert_eq!(error.to_string(), format!("the packed matrix cannot be quantized: {what}"), "{scheme:?}");
            assert!(matches!(error, PackedError::CannotQuantize { .. }));
        }
    }
}

/// Below 2^-127 MXFP4 has no scale. mlx 0.32.4 writes one of 2^256 times as much.
#[test]
fn groups_of_the_smallest_numbers_stay_small() {
    let values: Vec<f32> = (0..64).map(|n| n as f32 * 1e-42).collect();
    let packed = quantize(Scheme::Mxfp4, &values, [1, 64], Stored::F32).expect("a packed matrix");
    for (column, value) in values.iter().enumerate() {
        assert!((packed.value(0, column) - value).abs() <= 2f32.powi(-129), "element {column}");
    }
}

#[test]
fn the_reference_packs_these_matrices() {
    let (columns, other) = ([48, 192], [48, 176]);
    for (_, scheme) in SCHEMES {
        let is_mlx = !matches!(scheme, Scheme::Nf4 | Scheme::Int8);
        assert!(applies(scheme, columns, true), "{scheme:?}");
        assert_eq!(applies(scheme, columns, false), is_mlx, "{scheme:?}");
        assert_eq!(applies(scheme, other, true), !is_mlx, "{scheme:?}");
    }
    assert!(applies(Scheme::Mxfp4, [8, 96], false) && !applies(Scheme::Mlx8, [8, 96], true));
}

#[test]
fn the_config_names_the_form() {
    let text = |scheme| {
        let lines = config_entry(scheme).into_iter().map(|(key, value)| format!("{key} {value}"));
        lines.collect::<Vec<_>>().join("\n")
    };
    let mlx = r#"{"group_size":64,"bits":4,"mode":"affine"}"#;
    assert_eq!(text(Scheme::Mlx4), format!("quantization {mlx}\nquantization_config {mlx}"));
    let mxfp4 = r#"{"group_size":32,"bits":4,"mode":"mxfp4"}"#;
    assert_eq!(text(Scheme::Mxfp4), format!("quantization {mxfp4}\nquantization_config {mxfp4}"));
    // json.dumps(BitsAndBytesConfig(...).to_dict()) of transformers 5.23.
    let bits = r#"{"quant_method":"bitsandbytes","_load_in_8bit":false,"_load_in_4bit":true,"llm_int8_threshold":6.0,"llm_int8_skip_modules":null,"llm_int8_enable_fp32_cpu_offload":false,"llm_int8_has_fp16_weight":false,"bnb_4bit_quant_type":"nf4","bnb_4bit_use_double_quant":false,"bnb_4bit_compute_dtype":"bfloat16","bnb_4bit_quant_storage":"uint8","load_in_4bit":true,"load_in_8bit":false}"#;
    assert_eq!(text(Scheme::Nf4), format!("quantization_config {bits}"));
}

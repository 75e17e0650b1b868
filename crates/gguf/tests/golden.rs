//! The bytes of this crate against those of gguf-py (`scripts/make_gguf_golden.py`).

use std::path::PathBuf;

use finetune_gguf::{File, TensorType, Value, header, padding};

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf/golden.gguf")
}

#[test]
fn numbers_are_rounded_to_the_bytes_of_gguf_py() {
    let golden = File::open(&path()).expect("a file of gguf-py");
    let mut compared = 0;
    for tensor in golden.tensors() {
        let (name, _) = tensor.name.rsplit_once('.').unwrap_or((&tensor.name, ""));
        if tensor.name == "vector" {
            continue;
        }
        let numbers = golden.values(&format!("{name}.f32")).expect("the numbers in f32");
        let bytes = tensor.kind.encode(&numbers).expect("a type that is written");
        let theirs = golden.bytes(&tensor.name).expect("the bytes of gguf-py");
        let different = bytes.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count();
        assert_eq!((bytes.len(), different), (theirs.len(), 0), "{}", tensor.name);
        let back = tensor.kind.decode(&theirs).expect("a type that is read");
        let nearest = back.iter().zip(&numbers).all(|(back, number)| (back - number).abs() <= number.abs().max(600.0));
        assert!(back.len() == numbers.len() && nearest, "{}", tensor.name);
        compared += numbers.len();
    }
    assert!(compared > 4 * 1000, "{compared} numbers");
}

/// Read and written again, the file has the same bytes.
#[test]
fn a_file_is_written_as_gguf_py_writes_it() {
    let golden = File::open(&path()).expect("a file of gguf-py");
    let mut bytes = header(golden.metadata(), golden.tensors()).expect("what was read can be written");
    for tensor in golden.tensors() {
        let numbers = golden.bytes(&tensor.name).expect("its bytes");
        bytes.extend(&numbers);
        bytes.resize(bytes.len() + padding(numbers.len() as u64), 0);
    }
    let theirs = std::fs::read(path()).expect("the file");
    assert!(bytes == theirs, "{} bytes against {}", bytes.len(), theirs.len());
}

#[test]
fn values_of_every_type_are_read() {
    let golden = File::open(&path()).expect("a file of gguf-py");
    let is = |key: &str, value: Value| assert_eq!(golden.get(key), Some(&value), "{key}");
    is("general.architecture", Value::String("llama".into()));
    is("golden.u8", Value::U8(200));
    is("golden.i8", Value::I8(-100));
    is("golden.u16", Value::U16(60_000));
    is("golden.i16", Value::I16(-30_000));
    is("golden.u32", Value::U32(4_000_000_000));
    is("golden.i32", Value::I32(-2_000_000_000));
    is("golden.f32", Value::F32(0.1));
    is("golden.u64", Value::U64(1 << 63));
    is("golden.i64", Value::I64(-(1 << 62)));
    is("golden.f64", Value::F64(0.1));
    is("golden.yes", Value::Bool(true));
    is("golden.no", Value::Bool(false));
    is("golden.strings", Value::strings(["<s>", "ä\n", "🦙"]));
    is("golden.numbers", Value::Array(vec![Value::I32(1), Value::I32(-2), Value::I32(3)]));
    is("golden.floats", Value::Array(vec![Value::F32(0.5), Value::F32(-1000.0)]));
    is("golden.flags", Value::Array(vec![Value::Bool(true), Value::Bool(false)]));
    assert_eq!(golden.get("general.file_type").and_then(Value::as_u64), Some(7));
    assert_eq!(golden.get("golden.i8").and_then(Value::as_u64), None);
    let vector = golden.tensors().iter().find(|tensor| tensor.name == "vector").expect("the last tensor");
    assert_eq!((vector.shape.as_slice(), vector.kind), ([3].as_slice(), TensorType::F32));
    assert_eq!(golden.values("vector").expect("its numbers"), [0.0, 1.0, 2.0]);
}

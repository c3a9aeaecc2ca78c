//! Products of whole matrices on every device, against sums in f64.

mod common;

use common::{close, devices, values};
use marlin_gpu::open;
use marlin_tensor::Factored;

#[test]
fn sums_of_outer_products_leave_out_rows_that_are_not_finite() {
    for device in &devices() {
        let backend = open(device).unwrap();
        let algebra = backend.algebra().unwrap();
        for (columns, calls) in [(4, vec![1]), (132, vec![0, 3, 50]), (260, vec![9, 130])] {
            let what = format!("{} {columns}", device.name);
            let sum = algebra.create_gram(columns).unwrap().unwrap();
            let mut expected = vec![0.0; columns * columns];
            let mut bad = 0;
            for (call, rows) in calls.into_iter().enumerate() {
                let mut x = values(rows * columns, (columns + call) as u64);
                for (row, value) in [(1, f32::NAN), (7, f32::INFINITY)] {
                    if row < rows {
                        x[row * columns + columns / 2] = value;
                        bad += 1;
                    }
                }
                for row in x.chunks(columns).filter(|row| row.iter().all(|v| v.is_finite())) {
                    for (i, a) in row.iter().enumerate() {
                        for (j, b) in row.iter().enumerate() {
                            expected[i * columns + j] += f64::from(*a) * f64::from(*b);
                        }
                    }
                }
                algebra.add_gram(&backend.upload(rows, columns, x).unwrap(), &sum).unwrap();
            }
            let (found, left_out) = algebra.download_gram(&sum).unwrap();
            assert_eq!(left_out, bad, "{what}");
            let lower = |all: &mut dyn Iterator<Item = f64>| -> Vec<f64> {
                all.enumerate()
                    .map(|(at, v)| if at % columns <= at / columns { v } else { 0.0 })
                    .collect()
            };
            let found = lower(&mut found.iter().map(|v| f64::from(*v)));
            let found: Vec<f32> = found.iter().map(|v| *v as f32).collect();
            close(&what, &found, &lower(&mut expected.into_iter()), 1e-6);
        }
        assert!(algebra.create_gram(6).unwrap().is_none(), "no kernel for rows of six values");
    }
}

#[test]
fn products_are_the_sums_they_stand_for() {
    for device in &devices() {
        let backend = open(device).unwrap();
        let algebra = backend.algebra().unwrap();
        for (rows, depth, columns) in [(1, 4, 4), (7, 30, 132), (136, 260, 128), (130, 17, 260)] {
            let what = format!("{} {rows}x{depth}x{columns}", device.name);
            let (a, b) = (values(rows * depth, 1), values(depth * columns, 2));
            let expected: Vec<f64> = (0..rows * columns)
                .map(|at| {
                    let (i, j) = (at / columns, at % columns);
                    let term = |l| f64::from(a[i * depth + l]) * f64::from(b[l * columns + j]);
                    (0..depth).map(term).sum()
                })
                .collect();
            let placed = algebra.place(depth, columns, &b).unwrap().unwrap();
            let found = algebra.times(&a, &placed).unwrap();
            close(&what, &found, &expected, 1e-6);
        }
        assert!(algebra.place(3, 5, &[0.0; 15]).unwrap().is_none(), "no kernel for five columns");
    }
}

/// `L` of `A = L D Lᵀ` in blocks of sixteen, in f64.
fn block_ldl(a: &[f32], k: usize) -> Vec<f64> {
    let mut c: Vec<f64> = a.iter().map(|v| f64::from(*v)).collect();
    for j in 0..k {
        for i in j..k {
            let known: f64 = (0..j).map(|m| c[i * k + m] * c[j * k + m]).sum();
            let left = c[i * k + j] - known;
            c[i * k + j] = if i == j { left.sqrt() } else { left / c[j * k + j] };
        }
    }
    let mut l = vec![0.0; k * k];
    for i in 0..k {
        for first in (0..=i).step_by(16) {
            for j in (first..first + 16).rev() {
                let own = if j <= i { c[i * k + j] } else { 0.0 };
                let known: f64 = (j + 1..first + 16).map(|m| l[i * k + m] * c[m * k + j]).sum();
                l[i * k + j] = (own - known) / c[j * k + j];
            }
        }
    }
    l
}

#[test]
fn factors_are_those_of_the_definition() {
    for device in &devices() {
        let backend = open(device).unwrap();
        let algebra = backend.algebra().unwrap();
        for k in [64, 128, 320] {
            let rows = 2 * k;
            let x = values(rows * k, k as u64);
            let mut a = vec![0.0f32; k * k];
            for (i, j) in (0..k).flat_map(|i| (0..=i).map(move |j| (i, j))) {
                let sum: f32 = (0..rows).map(|r| x[r * k + i] * x[r * k + j]).sum();
                (a[i * k + j], a[j * k + i]) = (sum, sum);
            }
            let mean = (0..k).map(|i| a[i * k + i]).sum::<f32>() / k as f32;
            (0..k).for_each(|i| a[i * k + i] += 0.01 * mean);
            let what = format!("{} {k}", device.name);
            let Factored::Done(found) = algebra.block_ldl(&a, k).unwrap() else {
                panic!("{what}: not factored");
            };
            close(&what, &found, &block_ldl(&a, k), 1e-4);
            // One direction that takes energy away.
            a[(k - 1) * k + k - 1] = -1.0;
            assert!(matches!(algebra.block_ldl(&a, k).unwrap(), Factored::Indefinite), "{what}");
        }
        assert!(matches!(algebra.block_ldl(&[1.0], 1).unwrap(), Factored::Elsewhere));
    }
}

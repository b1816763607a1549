buildscript {
    dependencies {
        classpath(libs.kotlin.gradle.plugin) // Kotlin is built into Android's plugin; this is its version
    }
}

plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.android.library) apply false
}

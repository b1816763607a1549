plugins {
    alias(libs.plugins.android.library)
}

android {
    namespace = "edgewright.client"
    compileSdk = 36

    defaultConfig {
        minSdk = 27 // SharedMemory
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

dependencies {
    api(libs.coroutines)
    implementation(libs.onnxruntime)
}
